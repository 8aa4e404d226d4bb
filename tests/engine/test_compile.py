"""Compiling: whether it pays, what remembers it, and what happens where it fails."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set, run

from fastcifar.config import EngineConfig, LossConfig, ModelConfig
from fastcifar.engine import compile as module
from fastcifar.engine.compile import obstacle_to_compiling
from fastcifar.engine.trainer import Trainer


@pytest.mark.gpu
def test_a_gpu_compiles():
    trainer = Trainer(
        replace(CONFIG, engine=EngineConfig(device="cuda:0", precision="bf16", compile="on")), image_set(100)
    )
    assert trainer.compile().startswith("Compiled in")
    run(trainer)


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
            outcome = function(*arguments)
            return outcome._replace(loss=Broken.apply(outcome.loss))

        return call

    monkeypatch.setattr(torch, "compile", broken)
    trainer = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), image_set(40))
    assert trainer.compile() == "Not compiled: torch.compile failed (no C++ compiler); training goes on without it."
    assert trainer.config.engine.compile == "off"
    fresh = run(Trainer(CONFIG, image_set(40)))
    assert all(torch.equal(a, b) for a, b in zip(run(trainer).buckets.flat, fresh.buckets.flat, strict=True))


@pytest.mark.parametrize(
    ("device", "step_seconds", "steps", "cached", "compiles"),
    [
        ("cpu", 0.5, 100, False, False),  # 50 s, of which compiling would win back 12
        ("cpu", 0.5, 100, True, True),
        ("cpu", 0.1, 19_500, False, True),
        ("cuda", 0.0004, 78_000, False, False),  # resnet20_v2 for 200 epochs on a fast card: 31 s in all
        ("cuda", 0.002, 78_000, False, False),  # resnet_prop there: 156 s, a twentieth of which is less than 40
        ("cuda", 0.002, 78_000, True, True),
        ("cuda", 0.02, 78_000, False, True),  # and on a slow card
    ],
)
def test_compiling_has_to_win_back_its_time(device, step_seconds, steps, cached, compiles):
    found = obstacle_to_compiling("auto", steps, lambda: step_seconds, device, cached)
    assert (found is None) == compiles
    if not compiles:
        assert f"{step_seconds * steps:.0f} s of training would not win back the {4 if cached else 40} s" in found


def test_what_was_asked_for_is_not_timed():
    def refuse():
        raise AssertionError

    assert obstacle_to_compiling("on", 1, refuse, "cpu", cached=False) is None
    assert obstacle_to_compiling("off", 1, refuse, "cpu", cached=False) == "Not compiled, as asked."
    assert obstacle_to_compiling("on", 0, refuse, "cpu", cached=False) == "Not compiled: no step is left to run."


@pytest.mark.usefixtures("card")
def test_on_a_gpu_the_step_that_is_timed_is_captured(monkeypatch):
    """And kept, where compiling does not pay."""
    monkeypatch.setattr(torch, "compile", None)
    trainer = Trainer(
        replace(CONFIG, engine=EngineConfig(device="cuda:0", precision="bf16", compile="auto")), image_set(100)
    )
    kept = [flat.clone() for flat in trainer.buckets.flat]
    assert "would not win back" in trainer.compile()
    captured = trainer.captured
    assert trainer.capture() == "Captured, 8 steps a launch."
    assert trainer.captured is captured
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.buckets.flat, strict=True))


@pytest.mark.usefixtures("card")
def test_on_a_gpu_a_compiled_step_is_captured_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *batch: function(*batch))
    monkeypatch.setattr(Trainer, "eager_step_seconds", lambda trainer: trainer.try_capture() or 1e4)
    trainer = Trainer(
        replace(CONFIG, engine=EngineConfig(device="cuda:0", precision="bf16", compile="auto")), image_set(100)
    )
    assert trainer.compile().startswith("Compiled in")
    assert trainer.captured is None
    trainer.capture()
    run(trainer)


def test_marks_tell_apart_what_compiles_differently():
    device = torch.device("cpu")
    other = replace(CONFIG, batch_size=21), replace(CONFIG, loss=LossConfig()), replace(CONFIG, model=ModelConfig())
    assert len({module.mark_of(config, device) for config in (CONFIG, *other)}) == 4
    assert module.mark_of(replace(CONFIG, seed=9, epochs=99), device) == module.mark_of(CONFIG, device)


@pytest.mark.slow
def test_compiled_equals_eager():
    dataset = image_set(100)
    eager = run(Trainer(CONFIG, dataset))
    compiled = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), dataset)
    assert compiled.compile().startswith("Compiled in")
    run(compiled)
    for a, b in zip(eager.buckets.flat, compiled.buckets.flat, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)
