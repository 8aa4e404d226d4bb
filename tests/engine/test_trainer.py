"""The training loop against a plain one written out with torch alone, and its bookkeeping."""

import copy
from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, DROPOUT, METHODS, image_set, run
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastcifar.config import AverageConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.engine import snapshot
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.models import build_model
from fastcifar.optim.optimizers import build_optimizer


def plain_loop(config: RunConfig, dataset: ImageSet) -> tuple[nn.Module, nn.Module]:
    """What the reports wrote: a model, torch's optimiser, scheduler and average, a loop."""
    loader = Loader(dataset, batch_size=config.batch_size, seed=config.seed, device="cpu", drop_last=True)
    torch.manual_seed(config.seed)
    model = build_model("resnet", classes=5, image_size=16, **config.model.options)
    optim = config.optim
    optimizer = torch.optim.SGD(
        model.parameters(), optim.lr, momentum=optim.momentum, nesterov=True, weight_decay=optim.weight_decay
    )
    total = config.epochs * len(loader)
    warmup = total // 10
    factor = [(step + 1) / warmup for step in range(warmup)]
    factor += [
        0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / (total - warmup))))) for step in range(total - warmup)
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor[min(step, total - 1)])

    average = copy.deepcopy(model)
    step = 0
    for epoch in range(config.epochs):
        for images, labels in loader.batches(epoch):
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.loss.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            decay = min(config.average.ema_decay[0], (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(average.state_dict().values()), list(model.state_dict().values()), step)
            step += 1
    return model, average


def test_equals_a_plain_loop():
    dataset = image_set(105)
    trainer = run(Trainer(CONFIG, dataset))
    model, averaged = plain_loop(CONFIG, dataset)
    for (name, ours), theirs in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    with trainer.buckets.holding(trainer.averages.flat["ema-0.999"]):
        for ours, theirs in zip(trainer.model.state_dict().values(), averaged.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize("backend", ["torch", "dali", "triton"])
def test_a_gpu_trains_as_a_cpu_does(backend, request):
    """In float32; the batches are the same to the last bit, the sums differ in their order."""
    if backend == "dali" and "gpu" in request.fixturenames:
        request.getfixturevalue("dali")
    dataset = image_set(105)
    config = replace(CONFIG, data=DataConfig(loader=backend, chunk_size=40))
    reference = run(Trainer(CONFIG, dataset))
    trainer = run(Trainer(replace(config, engine=replace(CONFIG.engine, device="cuda:0")), dataset))
    for ours, theirs in zip(reference.buckets.flat, trainer.buckets.flat, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=5e-3, atol=1e-4)


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gpu_trains_in_low_precision_and_resumes_to_the_same_bits(precision):
    engine = replace(CONFIG.engine, device="cuda:0", precision=precision)
    config = replace(CONFIG, engine=engine, data=DataConfig(loader="torch"), epochs=3)
    whole, first, second = (Trainer(config, image_set(100)) for _ in range(3))
    run(whole)
    first.run_epoch(stop=lambda: False, tick=lambda batch: None)
    snapshot.restore(second, snapshot.take(first))
    run(second)
    assert whole.meter.read().first_bad_step is None
    for a, b in zip(whole.buckets.flat, second.buckets.flat, strict=True):
        assert torch.equal(a, b)


def test_swapping_the_average_in_and_out_changes_nothing():
    trainer = run(Trainer(replace(CONFIG, epochs=1), image_set(40)))
    before = [flat.clone() for flat in trainer.buckets.flat]
    with trainer.buckets.holding(trainer.averages.flat["ema-0.999"]):
        assert not torch.equal(before[0], trainer.buckets.flat[0])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.buckets.flat, strict=True))


def test_rehearsing_leaves_no_trace():
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5))
    rehearsed, fresh = Trainer(config, image_set(60)), Trainer(config, image_set(60))
    rehearsed.rehearse(rehearsed.objective)
    for a, b in zip(run(rehearsed).buckets.flat, run(fresh).buckets.flat, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0, 5, 8])
def test_going_on_from_any_batch_gives_the_same_bits(method, at):
    """5 batches an epoch."""
    config = replace(DROPOUT, **METHODS[method])
    whole, first, second = (Trainer(config, image_set(100), image_set(20, 1)) for _ in range(3))
    run(whole)
    run(first, stop_after=at + 1)
    snapshot.restore(second, snapshot.take(first))
    assert second.steps_done == at + 1
    run(second)
    for ours, theirs in zip(snapshot.take(whole).files().items(), snapshot.take(second).files().items(), strict=True):
        assert ours[0] == theirs[0]
        for name, tensor in ours[1].items():
            assert torch.equal(tensor, theirs[1][name]), (ours[0], name)
    assert whole.lr[-1] == second.lr[-1]
    assert whole.meter.read() == second.meter.read()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.progress.update(epoch=99), "progress does not fit"),
        (lambda c: c.progress.update(step=1), "progress does not fit"),
        (lambda c: c.progress.update(snapshots=["snapshot-1"]), "progress does not fit"),
        (lambda c: c.state.pop("meter"), "lacks meter"),
        (lambda c: c.state.update(random=torch.zeros_like(c.state["random"]) + 255), "state is damaged"),
        (lambda c: c.state.update(meter=torch.zeros(3)), "has meter as float32"),
        (lambda c: c.weights["weights"].pop("stem.weight"), "lacks stem.weight"),
    ],
    ids=["epoch", "step", "snapshot", "no-meter", "random", "meter-dtype", "no-weight"],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(damage, message):
    checkpoint = snapshot.take(Trainer(CONFIG, image_set(40)))
    damage(checkpoint)
    with pytest.raises(FastcifarError, match=message):
        snapshot.restore(Trainer(CONFIG, image_set(40)), checkpoint)


def test_clipping_bounds_the_whole_gradient():
    config = replace(
        CONFIG,
        optim=replace(CONFIG.optim, clip_norm=1e-3, momentum=0.0, weight_decay=0.0, lr=1.0),
        schedule=ScheduleConfig(warmup="0%"),
        epochs=1,
    )
    trainer = Trainer(config, image_set(20))
    before = trainer.buckets.flat[0].clone()
    run(trainer)
    assert float((trainer.buckets.flat[0] - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_names_the_step_the_lr_and_the_advice():
    config = replace(CONFIG, optim=replace(CONFIG.optim, lr=1e30), schedule=ScheduleConfig(warmup="0%"))
    trainer = Trainer(config, image_set(100))
    trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)
    with pytest.raises(FastcifarError, match=r"NaN at step [1-4] of 10 \(epoch 1, lr .*e\+\d+\); lower --lr"):
        trainer.check_finite(trainer.meter.read())


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
    raw = trainer.evaluate(dataset, trainer.last())["weights"]
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(((dataset.images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    assert raw.accuracy * 333 == int((logits.argmax(1) == dataset.labels).sum())
    assert raw.loss == pytest.approx(float(F.cross_entropy(logits, dataset.labels)), rel=1e-5)


def test_an_overflowing_first_step_leaves_clean_momenta():
    """As a scaled loss does on a GPU: the fused kernel is told to skip, and must find no uninitialised memory the
    next time.
    """
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.0))
    model(torch.ones(1, 3)).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert not optimizer.state[parameter]["momentum_buffer"].any()


@pytest.mark.parametrize("kind", ["mixup:0.4", "cutmix"])
def test_mixed_labels_train(kind):
    config = replace(CONFIG, data=replace(CONFIG.data, augment=kind), epochs=1)
    trainer = run(Trainer(config, image_set(60)))
    record = trainer.end_epoch(trainer.meter.read())
    assert 0 < record.train_loss < 4
    assert 0 <= record.train_accuracy <= 1


def test_the_best_epoch_on_the_validation_split_is_kept():
    """Of each kind of weights; and no other split chooses."""
    trainer = Trainer(
        replace(CONFIG, epochs=6, optim=OptimConfig(lr=0.5)), image_set(40), image_set(15, 1), image_set(15, 2)
    )
    kept = {}
    while trainer.epoch < 6:
        record = run(trainer, stop_after=trainer.steps_done + 2).records[-1]
        kept[trainer.epoch] = (record, trainer.buckets.copies())
    best = trainer.best["weights"]
    accuracies = [record.validation_accuracy for record, _ in kept.values()]
    assert best.score["accuracy"] == max(accuracies)
    record, flat = kept[best.score["epoch"]]
    assert record.validation_loss == min(
        r.validation_loss for r, _ in kept.values() if r.validation_accuracy == max(accuracies)
    )
    assert all(torch.equal(a, b) for a, b in zip(best.flat, flat, strict=True))
    assert trainer.best.keys() == {"weights", "ema-0.999"}
    assert trainer.chosen()["weights"] is best.flat
    assert not Trainer(CONFIG, image_set(40), None, image_set(15, 2)).best


def test_swa_is_the_mean_over_its_epochs_with_statistics_of_its_own():
    trainer = Trainer(
        replace(CONFIG, epochs=4, average=AverageConfig((0,), swa_start="50%")), image_set(40), image_set(15, 1)
    )
    ends = []
    while trainer.epoch < 4:
        run(trainer, stop_after=trainer.steps_done + 2)
        ends.append(trainer.buckets.copies())
    parameters, statistics = trainer.averages.flat["swa"]
    torch.testing.assert_close(parameters, (ends[2][0] + ends[3][0]) / 2)
    assert not torch.allclose(statistics, (ends[2][1] + ends[3][1]) / 2, rtol=1e-3)
    assert "swa" in trainer.records[-1].averaged_validation_accuracies
    assert "swa" not in trainer.records[0].averaged_validation_accuracies


def test_snapshots_are_the_weights_at_the_end_of_each_cycle():
    """Which is where the rate jumps up; 15 steps, the last of which ends no cycle."""
    schedule = ScheduleConfig("warm-restarts", warmup="2st", restart_period="4st", snapshots=True)
    trainer = Trainer(replace(CONFIG, epochs=3, schedule=schedule), image_set(100))
    jumps = [step for step in range(3, 15) if trainer.lr[step] > trainer.lr[step - 1]]
    seen = {}

    def look(batch: int) -> None:
        if trainer.steps_done in jumps:
            seen[f"snapshot-{len(seen) + 1}"] = copy.deepcopy(trainer.model.state_dict())

    while trainer.epoch < 3:
        trainer.run_epoch(stop=lambda: False, tick=look)
    assert jumps == [6, 10, 14]
    assert list(trainer.snapshots) == list(seen) == ["snapshot-1", "snapshot-2", "snapshot-3"]
    for name, kept in trainer.snapshots.items():
        assert all(torch.equal(tensor, seen[name][key]) for key, tensor in kept.items())
        assert kept.keys() == seen[name].keys()
    assert not torch.equal(seen["snapshot-1"]["stem.weight"], seen["snapshot-2"]["stem.weight"])


def test_a_plateau_lowers_the_rate_of_the_steps_to_come():
    schedule = ScheduleConfig("plateau", warmup="0%", patience=0, gamma=0.5)
    trainer = run(
        Trainer(
            replace(CONFIG, epochs=12, schedule=schedule, optim=OptimConfig(lr=0.3)), image_set(40), image_set(15, 1)
        )
    )
    plain = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, factor=0.5, patience=0)
    for record in trainer.records:
        assert record.lr == plain.param_groups[0]["lr"]
        torchs.step(record.validation_loss)
    assert trainer.records[-1].lr < 0.3


def test_sam_equals_a_plain_loop():
    """Two passes a step by hand; batch norm sees the first alone."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, sharpness="sam", rho=0.1), epochs=1)
    trainer = Trainer(config, image_set(60))
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = Loader(image_set(60), batch_size=20, seed=3, device="cpu", drop_last=True)
    for (images, labels), lr in zip(loader.batches(0), trainer.lr, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        first = torch.autograd.grad(
            F.cross_entropy(model(images), labels, label_smoothing=0.1), list(model.parameters())
        )
        state = copy.deepcopy(model.state_dict())
        norm = torch.cat([gradient.flatten() for gradient in first]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), first, strict=True):
                parameter.add_(0.1 * gradient / norm)
        second = torch.autograd.grad(
            F.cross_entropy(model(images), labels, label_smoothing=0.1), list(model.parameters())
        )
        model.load_state_dict(state)
        for parameter, gradient in zip(model.parameters(), second, strict=True):
            parameter.grad = gradient
        optimizer.step()
    run(trainer)
    for (name, ours), theirs in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_network_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match="parameters"):
        Trainer(replace(CONFIG, model=replace(CONFIG.model, max_params=100)), image_set(40))


def test_a_batch_in_passes_is_the_same_step():
    """In a network without batch norm; with SAM, whose two gradients are taken in passes both."""
    config = replace(
        CONFIG,
        model=ModelConfig(f"{__name__}:plain_network"),
        optim=OptimConfig("sgd", sharpness="sam", clip_norm=1.0),
        epochs=1,
    )
    whole, sliced = (
        Trainer(replace(config, engine=replace(CONFIG.engine, micro_batch=size)), image_set(60)) for size in (None, 8)
    )
    run(whole)
    run(sliced)
    torch.testing.assert_close(whole.buckets.flat[0], sliced.buckets.flat[0], rtol=1e-4, atol=1e-6)
    assert sliced.records[0].train_accuracy == whole.records[0].train_accuracy
    assert sliced.records[0].train_loss == pytest.approx(whole.records[0].train_loss, rel=1e-5)


def plain_network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
