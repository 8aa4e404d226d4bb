"""The training loop against a plain one written out with torch alone, and its bookkeeping."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastcifar.config import DataConfig, EngineConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.engine import graph
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import FastcifarError
from fastcifar.models import build_model
from fastcifar.optim.optimizers import build_optimizer

CONFIG = RunConfig(
    model=ModelConfig("resnet", blocks=(1, 1), channels=(8, 12), pre_activation=True),
    data=DataConfig(loader="torch", chunk_size=100),
    optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4),
    schedule=ScheduleConfig(warmup="10%"),
    loss=LossConfig(label_smoothing=0.1),
    engine=EngineConfig(device="cpu", precision="fp32", compile="off"),
    epochs=2,
    batch_size=20,
    seed=3,
)


def image_set(count: int, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 5, tuple("abcde"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def run(trainer: Trainer) -> Trainer:
    while trainer.epoch < trainer.config.epochs:
        assert trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)
    return trainer


def plain_loop(config: RunConfig, dataset: ImageSet) -> tuple[nn.Module, nn.Module]:
    """What the reports wrote: a model, torch's optimiser, scheduler and average, a loop."""
    loader = Loader(dataset, batch_size=config.batch_size, seed=config.seed, device="cpu", drop_last=True)
    torch.manual_seed(config.seed)
    model = build_model("resnet", classes=5, image_size=16, **config.model.options)
    optim = config.optim
    optimizer = torch.optim.SGD(model.parameters(), optim.lr, momentum=optim.momentum, nesterov=True, weight_decay=optim.weight_decay)
    total = config.epochs * len(loader)
    warmup = total // 10
    factor = [(step + 1) / warmup for step in range(warmup)]
    factor += [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / (total - warmup))))) for step in range(total - warmup)]
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
    with trainer.average.swapped_in():
        for ours, theirs in zip(trainer.model.state_dict().values(), averaged.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali", "triton"])
def test_a_gpu_trains_as_a_cpu_does(backend):
    """In float32; the batches are the same to the last bit, the sums differ in their order."""
    dataset = image_set(105)
    config = replace(CONFIG, data=DataConfig(loader=backend, chunk_size=40))
    reference = run(Trainer(CONFIG, dataset))
    trainer = run(Trainer(replace(config, engine=replace(CONFIG.engine, device="cuda:0")), dataset))
    for ours, theirs in zip(reference.buckets.flat, trainer.buckets.flat, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=5e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gpu_trains_in_low_precision_and_resumes_to_the_same_bits(precision):
    engine = replace(CONFIG.engine, device="cuda:0", precision=precision)
    config = replace(CONFIG, engine=engine, data=DataConfig(loader="torch"), epochs=3)
    whole, first, second = (Trainer(config, image_set(100)) for _ in range(3))
    run(whole)
    first.run_epoch(stop=lambda: False, tick=lambda batch: None)
    second.restore(first.checkpoint())
    run(second)
    assert whole.meter.read().first_bad_step is None
    for a, b in zip(whole.buckets.flat, second.buckets.flat, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_gpu_compiles():
    trainer = Trainer(replace(CONFIG, engine=EngineConfig(device="cuda:0", precision="bf16", compile="on")), image_set(100))
    assert trainer.compile().startswith("Compiled in")
    run(trainer)


def test_swapping_the_average_in_and_out_changes_nothing():
    trainer = run(Trainer(replace(CONFIG, epochs=1), image_set(40)))
    before = [flat.clone() for flat in trainer.buckets.flat]
    with trainer.average.swapped_in():
        assert not torch.equal(before[0], trainer.buckets.flat[0])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.buckets.flat, strict=True))


def test_rehearsing_leaves_no_trace():
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5))
    rehearsed, fresh = Trainer(config, image_set(60)), Trainer(config, image_set(60))
    rehearsed.rehearse(rehearsed.objective)
    for a, b in zip(run(rehearsed).buckets.flat, run(fresh).buckets.flat, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_going_on_from_any_batch_gives_the_same_bits(at):
    """With dropout, so that the random state counts; 5 batches an epoch."""
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.3), engine=replace(CONFIG.engine, precision="bf16"))
    whole, first, second = (Trainer(config, image_set(100)) for _ in range(3))
    run(whole)
    count = iter(range(100))
    first.run_epoch(stop=lambda: next(count) == at, tick=lambda batch: None)
    second.restore(first.checkpoint())
    assert second.steps_done == at + 1
    run(second)
    for a, b in zip((*whole.buckets.flat, *whole.average.averages), (*second.buckets.flat, *second.average.averages), strict=True):
        assert torch.equal(a, b)
    assert whole.meter.read() == second.meter.read()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.progress.update(epoch=99), "progress does not fit"),
        (lambda c: c.progress.update(step=1), "progress does not fit"),
        (lambda c: c.state.pop("meter"), "lacks meter"),
        (lambda c: c.state.update(random=torch.zeros_like(c.state["random"]) + 255), "state is damaged"),
        (lambda c: c.state.update(meter=torch.zeros(3)), "has meter as float32"),
        (lambda c: c.weights.pop("stem.weight"), "lacks stem.weight"),
    ],
    ids=["epoch", "step", "no-meter", "random", "meter-dtype", "no-weight"],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(damage, message):
    checkpoint = Trainer(CONFIG, image_set(40)).checkpoint()
    damage(checkpoint)
    with pytest.raises(FastcifarError, match=message):
        Trainer(CONFIG, image_set(40)).restore(checkpoint)


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
    trainer = run(Trainer(replace(CONFIG, epochs=1), image_set(100), validation=image_set(30, 1), watched=image_set(10, 2)))
    record = trainer.record(trainer.meter.read())
    assert (record.epoch, record.step) == (1, 5)
    assert 0.5 < record.train_loss < 4
    assert record.validation_accuracy * 30 == pytest.approx(round(record.validation_accuracy * 30))
    assert None not in (record.averaged_validation_accuracy, record.test_accuracy, record.averaged_test_accuracy)


def test_evaluation_equals_a_plain_one():
    trainer, dataset = Trainer(CONFIG, image_set(100)), image_set(333, 5)
    raw, _ = trainer.evaluate(dataset)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(((dataset.images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    assert raw.accuracy * 333 == int((logits.argmax(1) == dataset.labels).sum())
    assert raw.loss == pytest.approx(float(F.cross_entropy(logits, dataset.labels)), rel=1e-5)


def test_compiling_that_fails_falls_back_in_one_line(monkeypatch):
    """As late as in the backward pass; what the attempt moved is put back."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no C++ compiler\nlong trace")

    def broken(function, **options):
        def call(*arguments):
            loss, correct = function(*arguments)
            return Broken.apply(loss), correct

        return call

    monkeypatch.setattr(torch, "compile", broken)
    trainer = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), image_set(40))
    assert trainer.compile() == "Not compiled: torch.compile failed (no C++ compiler); training goes on without it."
    assert trainer.config.engine.compile == "off"
    fresh = run(Trainer(CONFIG, image_set(40)))
    assert all(torch.equal(a, b) for a, b in zip(run(trainer).buckets.flat, fresh.buckets.flat, strict=True))


def test_an_overflowing_first_step_leaves_clean_momenta():
    """As a scaled loss does on a GPU: the fused kernel is told to skip, and must find no uninitialised memory the next time."""
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
    record = trainer.record(trainer.meter.read())
    assert 0 < record.train_loss < 4
    assert 0 <= record.train_accuracy <= 1


def test_short_runs_are_not_compiled():
    outcome = graph.compile_where_it_pays(str, "auto", lambda function: None, steps=100)
    assert not outcome.compiled


@pytest.mark.slow
def test_compiled_equals_eager():
    dataset = image_set(100)
    eager = run(Trainer(CONFIG, dataset))
    compiled = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), dataset)
    assert compiled.compile().startswith("Compiled in")
    run(compiled)
    for a, b in zip(eager.buckets.flat, compiled.buckets.flat, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)
