"""Steps and evaluations as graphs, on a GPU or what stands for one."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, DROPOUT, METHODS, image_set, run
from torch import nn

from fastcifar.config import EngineConfig, OptimConfig
from fastcifar.device import synchronize
from fastcifar.engine import evaluate
from fastcifar.engine.compile import capture_obstacle
from fastcifar.engine.trainer import Trainer
from fastcifar.optim.optimizers import build_optimizer


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize(
    ("precision", "method"), [("fp16", "plain"), ("fp16", "rmsprop"), *(("bf16", method) for method in METHODS)]
)
def test_captured_steps_equal_launched_ones(precision, method):
    """To the bit, dropout included; what waits in the middle of a step is launched."""
    engine = EngineConfig(device="cuda:0", precision=precision, compile="off")
    launched, captured = (Trainer(replace(DROPOUT, engine=engine, **METHODS[method]), image_set(100)) for _ in range(2))
    line = captured.capture()
    if precision == "fp16" and not getattr(captured.optimizer, "_step_supports_amp_scaling", False):
        assert "in float16 waits to know whether the gradient overflowed" in line
        return
    assert line == "Captured, 8 steps a launch."
    run(launched)
    run(captured)
    for a, b in zip(launched.buckets.flat, captured.buckets.flat, strict=True):
        assert torch.equal(a, b)
    assert captured.book.number.item() == captured.total_steps


@pytest.mark.usefixtures("card", "deterministic")
@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_stop_between_two_launches_finishes_the_steps_that_wait(at):
    engine = EngineConfig(device="cuda:0", precision="bf16", compile="off")
    launched, captured = (Trainer(replace(DROPOUT, engine=engine), image_set(100)) for _ in range(2))
    captured.capture()
    for one in (launched, captured):
        run(run(one, at))
    for a, b in zip(launched.buckets.flat, captured.buckets.flat, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("card")
def test_capturing_leaves_no_trace():
    """Nor in the time of the other phases, nor after a resumption."""
    trainer = run(
        Trainer(replace(CONFIG, engine=replace(CONFIG.engine, device="cuda:0")), image_set(100)), stop_after=5
    )
    trainer.earlier = 17.0
    kept, seconds = [flat.clone() for flat in trainer.buckets.flat], dict(trainer.seconds)
    trainer.capture()
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.buckets.flat, strict=True))
    assert (trainer.book.number.item(), trainer.earlier) == (5, 17.0)
    assert {**trainer.seconds, "compile": 0.0} == {**seconds, "compile": 0.0}
    assert trainer.seconds["compile"] > seconds["compile"]


def test_a_recorded_evaluation_is_the_same(monkeypatch):
    """Full batches are replayed, the rest is not."""
    monkeypatch.setitem(evaluate.BATCH_SIZE, "cpu", 30)
    trainer, dataset = Trainer(CONFIG, image_set(100)), image_set(75, 5)
    plain = trainer.evaluator(dataset)
    replayed = []

    def record(call):
        return lambda: (replayed.append(1), call())

    trainer.evaluator.capture((16, 16), record)
    assert trainer.evaluator(dataset) == plain
    assert len(replayed) == 2


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("method", ["averages", "asam", "adam", "muon"])
def test_a_captured_epoch_neither_waits_nor_allocates(method):
    trainer = Trainer(
        replace(DROPOUT, engine=EngineConfig(device="cuda:0", precision="bf16", compile="off"), **METHODS[method]),
        image_set(100),
    )
    trainer.capture()
    run(trainer, stop_after=5)
    batches = [(images.clone(), labels.clone()) for images, labels in trainer.loader.batches(1)]
    synchronize(trainer.device)
    allocated, replays = torch.cuda.memory_stats()["allocation.all.allocated"], []
    trainer.captured.one = counting(trainer.captured.one, replays)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches:
            trainer.launch(images, labels)
        trainer.finish_steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == len(batches)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


def counting(call, calls):
    def counted():
        calls.append(call)
        call()

    return counted


@pytest.mark.parametrize(
    ("name", "expected"), [("adam", None), ("muon", None), ("rmsprop", "RMSprop in float16 waits")]
)
def test_what_waits_in_the_middle_of_a_step_is_not_captured(name, expected):
    optimizer = build_optimizer(nn.Linear(3, 2), OptimConfig(name))
    scaled, plain = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    found = capture_obstacle(optimizer, scaled, 100)
    assert found == expected or expected in found
    assert capture_obstacle(optimizer, plain, 100) is None
    assert "shorter" in capture_obstacle(optimizer, plain, 2)
