"""Compiling: whether it pays, what remembers it, and what happens where it fails."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set, run

from fastcifar.config import EngineConfig, LossConfig, ModelConfig
from fastcifar.engine import graph
from fastcifar.engine.trainer import Trainer


@pytest.mark.gpu
def test_a_gpu_compiles():
    trainer = Trainer(replace(CONFIG, engine=EngineConfig(device="cuda:0", precision="bf16", compile="on")), image_set(100))
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


def test_short_runs_are_not_compiled():
    outcome = graph.compile_where_it_pays(str, "auto", lambda function: None, steps=100)
    assert not outcome.compiled


def test_what_was_compiled_before_pays_sooner(monkeypatch, tmp_path):
    """50 s of eager training win back the 4 s of cached artefacts, and not the 40 s without."""
    monkeypatch.setattr(graph, "timed", lambda call, *arguments: 0.5)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    mark = tmp_path / "cache" / "mark"
    choices = [graph.compile_where_it_pays(str, asked, lambda function: None, 100, mark).compiled for asked in ("auto", "on", "auto")]
    assert choices == [False, True, True]


def test_marks_tell_apart_what_compiles_differently():
    device = torch.device("cpu")
    other = replace(CONFIG, batch_size=21), replace(CONFIG, loss=LossConfig()), replace(CONFIG, model=ModelConfig())
    assert len({graph.mark_of(config, device) for config in (CONFIG, *other)}) == 4
    assert graph.mark_of(replace(CONFIG, seed=9, epochs=99), device) == graph.mark_of(CONFIG, device)


@pytest.mark.slow
def test_compiled_equals_eager():
    dataset = image_set(100)
    eager = run(Trainer(CONFIG, dataset))
    compiled = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), dataset)
    assert compiled.compile().startswith("Compiled in")
    run(compiled)
    for a, b in zip(eager.buckets.flat, compiled.buckets.flat, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)
