"""The training loop and its records, against loops written out in plain torch."""

import copy
from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set, run
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastcifar.config import AverageConfig, DataConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.engine import evaluate
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.models import build_model


def plain_loop(config: RunConfig, dataset: ImageSet, rates: list[float]) -> tuple[nn.Module, nn.Module]:
    """Trains as the reports did: a model, torch's optimizer and average, a loop; with SAM two passes a step."""
    loader = Loader(dataset, batch_size=config.batch_size, seed=config.seed, device="cpu", drop_last=True)
    torch.manual_seed(config.seed)
    model, optim = build_model("resnet", classes=5, image_size=16, **config.model.options), config.optim
    average, parameters = copy.deepcopy(model), list(model.parameters())
    options = {"momentum": optim.momentum, "nesterov": True, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.SGD(parameters, 0.1, **options)
    batches = (batch for epoch in range(config.epochs) for batch in loader.batches(epoch))
    for step, (images, labels) in enumerate(batches):

        def gradients() -> tuple[torch.Tensor, ...]:
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.loss.label_smoothing)  # noqa: B023
            return torch.autograd.grad(loss, parameters)

        found = gradients()
        if optim.sharpness == "sam":
            before = copy.deepcopy(model.state_dict())  # batch norm sees the first pass alone
            norm = torch.cat([gradient.flatten() for gradient in found]).norm()
            with torch.no_grad():
                torch._foreach_add_(parameters, [optim.rho * gradient / norm for gradient in found])
            found = gradients()
            model.load_state_dict(before)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        decay = min(config.average.ema_decay[0], (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(average.state_dict().values()), list(model.state_dict().values()), step)
    return model, average


@pytest.mark.parametrize("method", [{}, {"sharpness": "sam", "rho": 0.1}], ids=["sgd", "sam"])
def test_equals_a_plain_loop(method):
    """In one seed of six, not in this one, a ReLU's input is so near zero that rounding decides whether it opens."""
    config, dataset = replace(CONFIG, seed=7, optim=replace(CONFIG.optim, **method)), image_set(105)
    trainer = run(Trainer(config, dataset))
    for name, model in zip(("weights", "ema-0.999"), plain_loop(config, dataset, trainer.state.lr), strict=True):
        with trainer.state.buckets.holding(trainer.state.last()[name]):
            torch.testing.assert_close(trainer.model.state_dict(), model.state_dict(), rtol=2e-3, atol=2e-5)


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize("backend", ["torch", "dali", "triton"])
def test_a_gpu_trains_as_a_cpu_does(backend, request):
    """Both train in float32; the batches are the same to the last bit, the sums differ in their order."""
    if backend == "dali" and "gpu" in request.fixturenames:
        request.getfixturevalue("dali")
    dataset = image_set(105)
    config = replace(CONFIG, data=DataConfig(loader=backend, chunk_size=40))
    reference = run(Trainer(CONFIG, dataset))
    trainer = run(Trainer(replace(config, engine=replace(CONFIG.engine, device="cuda:0")), dataset))
    for ours, theirs in zip(reference.state.buckets.flat, trainer.state.buckets.flat, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=5e-3, atol=1e-4)


def test_clipping_bounds_the_whole_gradient():
    config = replace(
        CONFIG,
        optim=replace(CONFIG.optim, clip_norm=1e-3, momentum=0.0, weight_decay=0.0, lr=1.0),
        schedule=ScheduleConfig(warmup="0%"),
        epochs=1,
    )
    trainer = Trainer(config, image_set(20))
    before = trainer.state.buckets.flat[0].clone()
    run(trainer)
    assert float((trainer.state.buckets.flat[0] - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_swa_is_the_mean_over_its_epochs_with_statistics_of_its_own():
    trainer = Trainer(
        replace(CONFIG, epochs=4, average=AverageConfig((0,), swa_start="50%")), image_set(40), image_set(15, 1)
    )
    ends = []
    while trainer.state.epoch < 4:
        run(trainer, stop_after=trainer.state.steps_done + 2)
        ends.append(trainer.state.buckets.copies())
    parameters, statistics = trainer.state.averages.flat["swa"]
    torch.testing.assert_close(parameters, (ends[2][0] + ends[3][0]) / 2)
    assert not torch.allclose(statistics, (ends[2][1] + ends[3][1]) / 2, rtol=1e-3)
    assert "swa" in trainer.records[-1].averaged_validation_accuracies
    assert "swa" not in trainer.records[0].averaged_validation_accuracies


def test_records_hold_what_was_trained_and_validated():
    config = replace(CONFIG, epochs=1)
    (record,) = run(Trainer(config, image_set(100), validation=image_set(30, 1), watched=image_set(10, 2))).records
    assert (record.epoch, record.step) == (1, 5)
    assert 0.5 < record.train_loss < 4
    assert record.validation_accuracy * 30 == pytest.approx(round(record.validation_accuracy * 30))
    assert record.test_accuracy is not None
    assert list(record.averaged_validation_accuracies) == list(record.averaged_test_accuracies) == ["ema-0.999"]


def test_evaluation_equals_a_plain_one():
    trainer, dataset = Trainer(CONFIG, image_set(100)), image_set(333, 5)
    raw = trainer.evaluate(dataset, trainer.state.last())["weights"]
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(((dataset.images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    assert raw.accuracy * 333 == int((logits.argmax(1) == dataset.labels).sum())
    assert raw.loss == pytest.approx(float(F.cross_entropy(logits, dataset.labels)), rel=1e-5)


def test_a_network_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match="parameters"):
        Trainer(replace(CONFIG, model=replace(CONFIG.model, max_params=100)), image_set(40))


def test_a_loss_that_is_not_finite_ends_the_epoch_within_some_steps():
    config = replace(CONFIG, optim=OptimConfig(lr=1e20), schedule=ScheduleConfig("constant", warmup="0%"))
    trainer = Trainer(config, image_set(2000))
    with pytest.raises(FastcifarError, match=r"infinite or NaN at step [1-9] of 200 \(epoch 1, lr 1e\+20\)"):
        trainer.run_epoch()
    assert trainer.state.batch == trainer.live_meter.every == 16


def test_a_last_update_to_infinite_weights_is_noticed():
    config = replace(CONFIG, optim=OptimConfig(lr=1e38), schedule=ScheduleConfig("constant", warmup="0%"), epochs=1)
    trainer = Trainer(config, image_set(20))
    with torch.no_grad():
        trainer.model.classifier.weight.mul_(100)
    assert trainer.run_epoch()
    with pytest.raises(FastcifarError, match=r"weights became infinite or NaN at step 0 of 1 \(epoch 1, lr 1e\+38\)"):
        trainer.read_totals()


def test_an_evaluation_with_outputs_that_are_not_finite_is_an_error():
    trainer = Trainer(CONFIG, image_set(20))
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(3e38)
    with pytest.raises(FastcifarError, match="outputs are infinite or NaN in the evaluation of weights after step 0"):
        trainer.evaluate(image_set(10), trainer.state.last())


def test_a_network_that_begins_with_nan_is_not_blamed_on_the_learning_rate():
    trainer = Trainer(CONFIG, image_set(40))
    with torch.no_grad():
        trainer.model.classifier.bias[0] = torch.nan
    trainer.run_epoch()
    with pytest.raises(FastcifarError, match=r"NaN at step 0 of 4 .*, before anything was learnt; mend the network"):
        trainer.read_totals()


def test_a_vast_weight_decay_is_named():
    config = replace(CONFIG, optim=OptimConfig("sgd", lr=0.1, weight_decay=1e38))
    trainer = Trainer(config, image_set(40))
    trainer.run_epoch()
    with pytest.raises(FastcifarError, match=r"; lower --weight-decay, which is customarily below 0.1"):
        trainer.read_totals()


def test_the_running_loss_and_accuracy_are_those_of_this_epoch_so_far():
    trainer, seen = Trainer(CONFIG, image_set(800)), []
    for _ in range(2):
        trainer.run_epoch(tick=lambda batch: seen.append((batch, trainer.running)))
        totals = trainer.read_totals()
        assert seen[14][1] is None, "nothing is known of an epoch before its first reading"
        assert seen[15][1] != seen[31][1]
        assert seen[31][1] == seen[-1][1]
        loss, accuracy = seen[-1][1]
        assert loss * 32 / 40 < totals.loss / 800
        assert accuracy * 32 / 40 <= totals.correct / 800
        seen.clear()


def test_a_recorded_evaluation_is_the_same(monkeypatch):
    monkeypatch.setitem(evaluate.BATCH_SIZE, "cpu", 30)
    trainer, dataset = Trainer(CONFIG, image_set(100)), image_set(75, 5)
    plain = trainer.evaluator(dataset)
    replayed = []

    def record(call):
        return lambda: (replayed.append(1), call())

    trainer.evaluator.capture((16, 16), record)
    assert trainer.evaluator(dataset) == plain
    assert len(replayed) == 2
