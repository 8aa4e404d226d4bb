"""Compiled and captured steps train as those launched part by part."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, DROPOUT, METHODS, assert_same_weights, image_set, run
from torch import nn

from fastcifar.config import EngineConfig, ModelConfig
from fastcifar.device import synchronize
from fastcifar.engine import launch
from fastcifar.engine.compile import Obstacle, Why
from fastcifar.engine.launch import Launcher
from fastcifar.engine.trainer import Trainer
from fastcifar.models import GIVEN

GPU = EngineConfig(device="cuda:0", precision="bf16", compile="off")


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [flat.clone() for flat in trainer.state.buckets.flat]


def test_compiling_that_fails_falls_back(monkeypatch):
    """The failure comes as late as in the backward pass; whatever the attempt moved is put back."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("no C++ compiler\nlong trace")

    def broken(function, **options):
        def call(*arguments):
            metrics = function(*arguments)
            return metrics._replace(loss=Broken.apply(metrics.loss))

        return call

    monkeypatch.setattr(torch, "compile", broken)
    trainer = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), image_set(40))
    assert trainer.compile() == Obstacle(Why.FAILED, "no C++ compiler")
    assert not trainer.launch.compiled
    assert_same_weights(run(trainer), run(Trainer(CONFIG, image_set(40))))


class Counting(nn.Module):
    """Counts its passes in training by buffers: an integer, one replaced by the next, an unsaved and a later one."""

    def __init__(self):
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm2d(3, momentum=None), nn.Linear(3, 5)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("later", None, persistent=False)

    def forward(self, x):
        if self.training:
            self.replaced = self.replaced + 1
            self.unsaved += 1
            self.later = torch.zeros(()) if self.later is None else self.later
            self.later += 1
        return self.classifier(self.norm(x).mean((2, 3)))


@pytest.mark.parametrize(("compiling", "sharpness"), [("auto", "none"), ("off", "sam")])
def test_only_the_first_pass_of_a_step_changes_a_networks_buffers(compiling, sharpness):
    """Neither the rehearsals that measure whether compiling pays nor SAM's second pass do."""
    engine, optim = replace(CONFIG.engine, compile=compiling), replace(CONFIG.optim, sharpness=sharpness)
    network = Counting()
    trainer = Trainer(
        replace(CONFIG, model=ModelConfig(GIVEN), engine=engine, optim=optim), image_set(100), model=network
    )
    trainer.compile()
    run(trainer)
    counts = network.norm.num_batches_tracked, network.replaced, network.unsaved, network.later
    assert [count.item() for count in counts] == [10, 10, 10, 10]


@pytest.mark.usefixtures("card")
def test_the_second_pass_of_captured_steps_counts_no_batches():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    config = replace(CONFIG, model=ModelConfig(GIVEN), engine=GPU, **METHODS["asam"])
    trainer = Trainer(config, image_set(100), model=nn.Sequential(*layers))
    assert trainer.capture() == 8
    assert run(trainer).model[1].num_batches_tracked.item() == 10


@pytest.mark.slow
def test_compiled_equals_eager():
    dataset = image_set(100)
    compiled = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), dataset)
    assert compiled.compile() > 0
    for a, b in zip(weights(run(Trainer(CONFIG, dataset))), weights(run(compiled)), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)


@pytest.mark.gpu
def test_a_gpu_compiles():
    trainer = Trainer(replace(CONFIG, engine=replace(GPU, compile="on")), image_set(100))
    assert trainer.compile() > 0
    run(trainer)


@pytest.mark.usefixtures("card")
def test_on_a_gpu_the_step_that_is_timed_is_captured_and_kept(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    trainer = Trainer(replace(CONFIG, engine=replace(GPU, compile="auto")), image_set(100))
    kept = weights(trainer)
    assert trainer.compile().why == Why.DOES_NOT_PAY
    captured = trainer.launch.captured
    assert trainer.capture() == 8
    assert trainer.launch.captured is captured
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(trainer), strict=True))


@pytest.mark.usefixtures("card")
def test_on_a_gpu_a_compiled_step_is_captured_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *batch: function(*batch))
    monkeypatch.setattr(Launcher, "eager_step_seconds", lambda launcher: launcher.capture() * 1e4)
    trainer = Trainer(replace(CONFIG, engine=replace(GPU, compile="auto")), image_set(100))
    assert trainer.compile() > 0
    assert trainer.launch.captured is None
    assert trainer.capture() == 8
    run(trainer)


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize(
    ("precision", "method"),
    [
        ("fp16", "plain"),
        *(("bf16", method) for method in ("averages", "asam", "muon", "one-cycle")),
        *(pytest.param("bf16", method, marks=pytest.mark.gpu) for method in METHODS),
    ],
)
def test_captured_steps_equal_launched_ones(precision, method):
    """They agree to the bit, dropout included."""
    config = replace(DROPOUT, engine=replace(GPU, precision=precision), **METHODS[method])
    launched, captured = (Trainer(config, image_set(100)) for _ in range(2))
    assert captured.capture() == 8
    assert_same_weights(run(launched), run(captured))
    assert captured.state.book.number.item() == captured.state.total_steps


@pytest.mark.usefixtures("card", "deterministic")
def test_one_cycle_moves_momentum_and_rate_on_a_gpu_as_on_a_cpu():
    config, gpu = replace(CONFIG, **METHODS["one-cycle"]), replace(GPU, precision="fp32")
    on_cpu, on_gpu = (Trainer(one, image_set(100)) for one in (config, replace(config, engine=gpu)))
    assert on_gpu.capture() == 8
    for cpu, other in zip(weights(run(on_cpu)), weights(run(on_gpu)), strict=True):
        torch.testing.assert_close(other.cpu(), cpu, rtol=1e-3, atol=1e-4)
    own = [trainer.state.optimizer.param_groups[0]["cycled"] for trainer in (on_cpu, on_gpu)]
    assert own == pytest.approx([0.95, 0.95])


@pytest.mark.usefixtures("card", "deterministic")
def test_a_stop_between_two_launches_finishes_the_steps_that_wait():
    launched, captured = (Trainer(replace(DROPOUT, engine=GPU), image_set(100)) for _ in range(2))
    captured.capture()
    assert_same_weights(*(run(run(one, 8)) for one in (launched, captured)))


@pytest.mark.usefixtures("card")
def test_capturing_leaves_no_trace():
    """The timings of the other phases show none, nor does a resumed run."""
    trainer = run(Trainer(replace(CONFIG, engine=GPU), image_set(100)), stop_after=5)
    trainer.clock.earlier = 17.0
    kept, seconds = weights(trainer), dict(trainer.clock.seconds)
    trainer.capture()
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(trainer), strict=True))
    assert (trainer.state.book.number.item(), trainer.clock.earlier) == (5, 17.0)
    assert trainer.clock.seconds.pop("compile") > seconds.pop("compile")
    assert trainer.clock.seconds == seconds


@pytest.mark.usefixtures("card")
def test_a_capture_that_fails_leaves_no_gradient(monkeypatch):
    made = Trainer(replace(DROPOUT, engine=GPU), image_set(100))

    def fail(recorder, step):
        step()
        made.objective(*made.launch.blank_batch(20)).loss.backward()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(launch.Recorder, "warm_up", fail)
    assert made.capture() == Obstacle(Why.FAILED, "out of memory")
    assert made.state.shadow.weights
    assert all(weight.grad is None for weight in (*made.model.parameters(), *made.state.shadow.weights.values()))


@pytest.mark.usefixtures("card")
def test_a_captured_epoch_neither_waits_nor_allocates():
    trainer = Trainer(replace(DROPOUT, engine=GPU, **METHODS["asam"]), image_set(100))
    trainer.capture()
    run(trainer, stop_after=5)
    batches = [(images.clone(), labels.clone()) for images, labels in trainer.loader.batches(1)]
    synchronize(trainer.device)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches:
            trainer.launch(images, labels)
        trainer.launch.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


def test_observed_steps_name_their_parts_and_train_the_same():
    """An observed step is launched part by part; `run_steps` goes round after the last epoch."""
    config = replace(CONFIG, **METHODS["asam"])
    plain, observed = (Trainer(config, image_set(60)) for _ in range(2))
    seen = []

    class Noted:
        def __init__(self, name: str) -> None:
            seen.append(name)

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    plain.run_steps(plain.endless_batches(), 7)
    observed.run_steps(observed.endless_batches(), 7, Noted)
    passes = ["Forward", "Backward"]
    assert seen[:10] == ["Batches", *passes, "Ascend", *passes, "Return", "Clip", "Update", "Average"]
    assert seen[10] == "Meter"
    assert len(seen) == 7 * 11
    assert (observed.state.epoch, observed.state.batch) == (0, 1)
    assert_same_weights(plain, observed)
