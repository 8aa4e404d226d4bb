"""A small run that tests train, of five batches of twenty images an epoch, and methods that change a step."""

from dataclasses import replace

import torch

from fastcifar.config import (
    AverageConfig,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.trainer import Trainer
from fastcifar.optim import OPTIMIZERS

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

DROPOUT = replace(
    CONFIG, model=replace(CONFIG.model, dropout=0.3), engine=replace(CONFIG.engine, precision="bf16"), epochs=3
)
"""A configuration with dropout, so that the random state matters."""

METHODS = {
    "plain": {},
    "averages": {"average": AverageConfig((0.9, 0.99), swa_start="30%")},
    "snapshots": {"schedule": ScheduleConfig("warm-restarts", warmup="2st", restart_period="4st", snapshots=True)},
    "plateau": {"schedule": ScheduleConfig("plateau", patience=0), "optim": OptimConfig(lr=0.3)},
    "one-cycle": {"schedule": ScheduleConfig("one-cycle")},
    "mixup": {"data": replace(CONFIG.data, augment="standard,mixup:0.4")},
    "asam": {"optim": OptimConfig("sgd", sharpness="asam", clip_norm=1.0)},
    **{name: {"optim": OptimConfig(name)} for name in OPTIMIZERS},
}


def image_set(count: int, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 5, tuple("abcde"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def run(trainer: Trainer, stop_after: int | None = None) -> Trainer:
    while trainer.state.epoch < trainer.config.epochs:
        if not trainer.run_epoch(stop=lambda: trainer.state.steps_done == stop_after):
            break
        trainer.records = [*getattr(trainer, "records", []), trainer.end_epoch(trainer.read_totals())]
        if trainer.state.steps_done == stop_after:
            break
    return trainer


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    for name, flat in one.state.last().items():
        assert all(torch.equal(a, b) for a, b in zip(flat, other.state.last()[name], strict=True)), name
