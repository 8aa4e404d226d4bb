"""Steps and evaluations as graphs: on a CPU with plain calls in their place, on a GPU captured."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, DROPOUT, METHODS, image_set, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.config import EngineConfig, OptimConfig
from fastcifar.engine import evaluate
from fastcifar.engine.capture import CapturedSteps, capture_obstacle
from fastcifar.engine.host import synchronize
from fastcifar.engine.trainer import Trainer
from fastcifar.optim.optimizers import build_optimizer


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_steps_in_groups_are_the_same_steps(monkeypatch, count, at):
    """What a GPU does with graphs, here with plain calls: batches are collected, and what is left of an epoch or before a stop is run."""
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.3))
    plain, grouped = (Trainer(config, image_set(100)) for _ in range(2))
    on_device(grouped)
    grouped.captured = CapturedSteps(grouped.step, grouped.number, *grouped.blank_batch(20), count, record=lambda call: call)
    run(run(plain, at))
    run(run(grouped, at))
    assert grouped.number.item() == grouped.total_steps
    for a, b in zip((*plain.buckets.flat, *plain.averages.ema), (*grouped.buckets.flat, *grouped.averages.ema), strict=True):
        assert torch.equal(a, b)
    assert plain.records[-1].train_loss == grouped.records[-1].train_loss


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


def on_device(trainer: Trainer) -> None:
    """Lets `trainer` count its steps, and read what depends on them, in tensors, as it does on a GPU."""
    trainer.number, trainer.lr_on_device = torch.zeros(1, dtype=torch.int64), torch.tensor(trainer.lr, dtype=torch.float64)
    for group in trainer.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    trainer.step = trainer.build_step(trainer.objective)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the value of a tensor."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method):
    """In a steady epoch."""
    if method == "radam":
        pytest.skip("torch's RAdam reads its count of steps, which lies on the CPU unless it is captured on a GPU")
    trainer = Trainer(replace(DROPOUT, **METHODS[method]), image_set(100))
    batches = list(trainer.loader.batches(0))
    trainer.model.train()
    trainer.launch(*batches[0])
    with NoWaiting():
        for images, labels in batches[1:]:
            trainer.batch += 1
            trainer.launch(images, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_equal_launched_ones(method):
    """To the bit, with deterministic algorithms; dropout included."""
    torch.use_deterministic_algorithms(True)
    engine = EngineConfig(device="cuda:0", precision="bf16", compile="off")
    launched, captured = (Trainer(replace(DROPOUT, engine=engine, **METHODS[method]), image_set(100)) for _ in range(2))
    assert captured.capture().startswith("Captured"), method
    run(launched)
    run(captured)
    torch.use_deterministic_algorithms(False)
    for a, b in zip(launched.buckets.flat, captured.buckets.flat, strict=True):
        assert torch.equal(a, b)
    assert captured.number.item() == captured.total_steps


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_epoch_neither_waits_nor_allocates(method):
    trainer = Trainer(
        replace(DROPOUT, engine=EngineConfig(device="cuda:0", precision="bf16", compile="on"), **METHODS[method]), image_set(100)
    )
    trainer.compile()
    trainer.capture()
    run(trainer, stop_after=5)
    batches = [(images.clone(), labels.clone()) for images, labels in trainer.loader.batches(1)]
    synchronize(trainer.device)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for images, labels in batches:
                trainer.launch(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    waits = [event.key for event in profile.key_averages() if "Synchronize" in event.key]
    assert not waits


@pytest.mark.parametrize(("name", "expected"), [("adam", None), ("muon", None), ("rmsprop", "RMSprop in float16 waits")])
def test_what_waits_in_the_middle_of_a_step_is_not_captured(name, expected):
    optimizer = build_optimizer(nn.Linear(3, 2), OptimConfig(name))
    scaled, plain = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    found = capture_obstacle(optimizer, scaled, 100)
    assert found == expected or expected in found
    assert capture_obstacle(optimizer, plain, 100) is None
    assert "shorter" in capture_obstacle(optimizer, plain, 2)
