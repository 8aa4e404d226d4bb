"""`fastcifar plan`: shows the learning rate, the cost and likely mistakes of a run before training."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastcifar.checks import given
from fastcifar.config import DataConfig, RunConfig
from fastcifar.engine.memory import (
    DataSize,
    MemoryPlan,
    check_passes,
    footprint,
    lay_out,
    memory_limit,
    passes_in_words,
    size,
)
from fastcifar.errors import ConfigError
from fastcifar.models import find_architecture
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.schedules import cycle_ends, horizon_steps, kinks, lr_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastcifar.device import Precision

POINTS, MOST_KINKS = 12, 40
"""Rows of the table of learning rates: spread evenly over the run, and most at bends and jumps."""
UNSUITED = 10.0
"""A learning rate beyond this factor of the optimiser's default is reported."""
NARROW, FEW_STEPS = 64, 4000
"""Last channels up to which, and steps of a run from which, a pre-activation network without a last norm may begin by
PyTorch's rule unreported. `resnet20_v2` has 64 and learned in 78 steps, where `resnet_prop` ended in NaN; the number
of steps is a cautious guess."""
CUT_SHORT = 0.05
"""Share of the peak that the learning rate may still have to fall at the end of a run with warm restarts."""
REHEARSED = {"cpu": 64, "cuda": 1024}
"""Most images that go through the network to measure its speed."""
REHEARSAL_SECONDS = 1.0


SIZES = {
    "cifar10": DataSize(50_000, 10_000),
    "cifar100": DataSize(50_000, 10_000, classes=100),
    "synthetic": DataSize(10_000, 2_000),
}


MISTAKES = {
    "ends_early": "{schedule} ends after {end:g} of {epochs} epochs and stays at lr {lr:.4g}, {share:.0%} of the peak; "
    "without --horizon it ends with the run.",
    "climbs_again": "{schedule} turns after {end:g} of {epochs} epochs and rises again, to lr {lr:.4g} at the "
    "end; without --horizon it ends with the run.",
    "cut_off": "{schedule} is laid out for {end:g} epochs, but the run ends after {epochs}, at lr {lr:.4g}, "
    "{share:.0%} of the peak; leave --horizon out.",
    "slow_one_cycle": "one-cycle is made to move on every step, but moves once an epoch; leave --per out.",
    "partial_cycle": "the run ends within a cycle, at lr {lr:.4g}, {share:.0%} of the peak; choose --restart-period "
    "and --warmup such that whole cycles fill it.",
    "lr_high": "lr {lr:g} is {ratio:,.0f} times above the {usual:g} that suits {optimizer}; leave out --lr to take it.",
    "lr_low": "lr {lr:g} is {ratio:,.0f} times below the {usual:g} that suits {optimizer}; leave out --lr to take it.",
    "no_final_norm": "{arch} without a norm before its classifier may diverge unless its rate rises over thousands of "
    "steps; add --final-norm.",
}
"""The text of each mistake, by its code."""


class Mistake(NamedTuple):
    """A setting that costs accuracy and is rarely intended."""

    code: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return MISTAKES[self.code].format(**self.values)


@dataclass(frozen=True)
class Outline:
    """The course of a run."""

    data: DataSize
    images: int
    """Number of training images."""
    steps_per_epoch: int
    lr: list[float]
    kinks: list[int]
    """Steps at which the learning rate bends or jumps."""
    snapshots: tuple[int, ...] = ()
    """The numbers of steps after which the weights are kept."""

    @property
    def steps(self) -> int:
        return len(self.lr)

    @property
    def rows(self) -> list[int]:
        """The steps with a row in the table, including the first and the last."""
        even = {round(point * (self.steps - 1) / (POINTS - 1)) for point in range(POINTS)}
        return sorted(even.union(self.kinks[:: max(1, math.ceil(len(self.kinks) / MOST_KINKS))]))


@dataclass(frozen=True)
class Cost:
    """The cost of a run."""

    parameters: int
    flops: int
    """FLOPs of the forward and backward passes of all steps; a multiplication and an addition are two."""
    memory: MemoryPlan
    """The memory layout of the run; unbounded where the device is absent or its free memory unknown."""
    precision: Precision
    rehearsed: int
    """Images that the speed was measured with."""
    speed: float | None
    """Images a second of forward and backward passes, uncompiled; None where the device is absent."""
    seconds: float | None
    """Seconds of all such passes of the run."""


def outline(config: RunConfig) -> Outline:
    """The course of a run. Reads the data set, and needs torch, only where the files alone tell its size.

    Raises:
        ConfigError: the images are too few, or do not suit the schedule.
        DataError: the files cannot be read.
    """
    data = data_size(config.data)
    images = data.train - config.data.val_split
    if images < 1:
        raise ConfigError(
            f"a validation split of {config.data.val_split} leaves none of {data.train} images; choose 0 to "
            f"{data.train - 1}."
        )
    if config.batch_size > images:
        raise ConfigError(f"batch size {config.batch_size} exceeds the {images} training images; lower --batch-size.")
    steps_per_epoch = images // config.batch_size
    lr = lr_table(config.schedule, config.optim.peak_lr(config.batch_size), steps_per_epoch, config.epochs)
    kept = cycle_ends(config.schedule, steps_per_epoch, config.epochs) if config.schedule.snapshots else ()
    bends = kinks(config.schedule, steps_per_epoch, config.epochs)
    return Outline(data, images, steps_per_epoch, lr, bends, tuple(kept))


def data_size(data: DataConfig) -> DataSize:
    """The size of a data set, read from the files unless it has a name (`auto` is CIFAR-10). Raises DataError."""
    name = "cifar10" if data.dataset == "auto" else data.dataset
    if name in SIZES:
        return SIZES[name]
    from fastcifar.data.sources import load_dataset

    train, test = (load_dataset(name, split, data.data_dir) for split in ("train", "test"))
    return DataSize(len(train), len(test), len(train.classes), train.image_size)


def mistakes(config: RunConfig, course: Outline) -> list[Mistake]:
    """A mistake for each setting that costs accuracy and is rarely intended."""
    found, name, schedule, optim = [], config.schedule.schedule, config.schedule.resolved, config.optim.resolved
    horizon = horizon_steps(schedule, course.steps_per_epoch, config.epochs)
    last, peak = course.lr[-1], config.optim.peak_lr(config.batch_size)
    at = {"schedule": name, "end": horizon / course.steps_per_epoch, "epochs": config.epochs}
    at |= {"lr": last, "share": last / peak}
    if horizon < course.steps and name != "swa":
        found.append(Mistake("climbs_again" if schedule.periodic else "ends_early", at))
    if horizon > course.steps:
        found.append(Mistake("cut_off", at))
    if name == "one-cycle" and schedule.per == "epoch":
        found.append(Mistake("slow_one_cycle", {}))
    if name == "warm-restarts" and last / peak - given(schedule.final_lr) > CUT_SHORT:
        found.append(Mistake("partial_cycle", at))
    lr, usual = given(optim.lr), OPTIMIZERS[optim.optimizer].lr
    ratio = max(lr / usual, usual / lr)
    if ratio > UNSUITED * (1 + 1e-9):
        code = "lr_high" if lr > usual else "lr_low"
        found.append(Mistake(code, {"lr": lr, "ratio": ratio, "usual": usual, "optimizer": optim.optimizer}))
    preset = find_architecture(config.model.arch).preset
    built = {"weight_init": "he", "channels": (512,), **preset, **config.model.options}
    large = built["weight_init"] == "he" or (built["channels"][-1] > NARROW and course.steps < FEW_STEPS)
    if built.get("pre_activation") and not built.get("final_norm") and large:
        found.append(Mistake("no_final_norm", {"arch": config.model.arch}))
    return found


def cost(config: RunConfig, course: Outline) -> Cost:
    """Computes the cost, and measures the speed where the device is present.

    Raises:
        ConfigError: as `build_model` and `memory.lay_out`; or the network has more parameters than allowed.
    """
    import torch

    from fastcifar.device import Precision, resolve_device, resolve_precision
    from fastcifar.models import build_model, check_parameters
    from fastcifar.models.count import count_network

    options = {"classes": course.data.classes, "image_size": course.data.image_size, **config.model.options}
    count = count_network(config.model.arch, **options)
    check_parameters(count.parameters, config.model.max_params)
    passes = course.steps * config.batch_size * (1 if config.optim.sharpness == "none" else 2)
    try:
        device, present = resolve_device(config.engine.device), True
    except ConfigError:
        device, present = torch.device(config.engine.device), False
    if present:
        limit = memory_limit(config.engine, device)
        precision = resolve_precision(config.engine.precision, device)
    else:
        limit = config.engine.memory_limit_bytes
        precision = Precision("bf16" if config.engine.precision == "auto" else config.engine.precision)
    taken = footprint(config, course.data, device, precision.dtype.itemsize, count)
    memory = lay_out(config, taken, limit or sys.maxsize)
    check_passes(config.model.arch, memory.batch_size, memory.micro_batch, count)
    batch, speed = min(memory.micro_batch, REHEARSED[device.type]), None
    if present:
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        images = torch.randn(batch, 3, *2 * [course.data.image_size], device=device)
        speed = rehearse(build_model(config.model.arch, **options), images, precision)
    flops, seconds = passes * count.training_flops, speed and passes / speed
    return Cost(count.parameters, flops, memory, precision, batch, speed, seconds)


def rehearse(model: nn.Module, images: Tensor, precision: Precision) -> float:
    """Images a second of the fastest forward and backward pass over `images`, float32 (N, 3, H, W).

    It repeats passes for about a second.

    The model is moved to their device, in training mode, and its running statistics change.
    """
    import torch

    from fastcifar.device import keep_freed_memory, synchronize
    from fastcifar.engine.compile import timed

    device, layout = images.device, torch.channels_last
    if device.type == "cpu":
        keep_freed_memory()
    model, images = model.to(device).to(memory_format=layout).train(), images.to(memory_format=layout)

    def once() -> None:
        with precision.autocast(device):
            logits = model(images)
        logits.float().logsumexp(dim=1).sum().backward()
        model.zero_grad(set_to_none=True)
        synchronize(device)

    once()
    end, best = time.perf_counter() + REHEARSAL_SECONDS, timed(once)
    while time.perf_counter() < end:
        best = min(best, timed(once))
    return len(images) / best


def print_plan(config: RunConfig, picture: Path) -> None:
    """Prints the plan and draws the learning rate to the PNG file `picture`. Raises as `outline` and `cost`."""
    course = outline(config)
    from fastcifar.output import printable
    from fastcifar.plots import draw, plot_lr

    spent, console = cost(config, course), Console(highlight=False, soft_wrap=True)
    console.print(rates(course, config.optim.peak_lr(config.batch_size)))
    parts = ", ".join(f"{what} {size(held)}" for what, held in spent.memory.parts.items() if held)
    there = "" if spent.memory.limit == sys.maxsize else f" of {size(spent.memory.limit)}"
    source = "auto, taken for CIFAR-10" if config.data.dataset == "auto" else config.data.dataset
    steps = f"{config.epochs} epochs of {course.steps_per_epoch:,}, {config.batch_size} images each"
    facts = {
        "network": f"{config.model.arch}, {spent.parameters:,} parameters",
        "images": f"{course.images:,} from {source}",
        "steps": f"{course.steps:,}: {steps}",
        "arithmetic": f"{spent.flops:.3g} FLOP ({spent.flops / course.steps:.3g} a step)",
        "memory": f"{size(spent.memory.needed)}{there}, {passes_in_words(spent.memory)}: {parts}",
        "time": time_line(config, spent),
    }
    if course.snapshots:
        epochs = ", ".join(f"{step / course.steps_per_epoch:.4g}" for step in course.snapshots)
        facts["snapshots"] = f"after {epochs} epochs"
    if config.schedule.schedule == "plateau":
        console.print("This is the rate as long as the loss keeps falling; when it is lowered, only training can tell.")
    for name, text in facts.items():
        console.print(f"{name:12}{printable(text)}", markup=False)
    for mistake in mistakes(config, course):
        console.print(f"Warning: {mistake}", markup=False, style="bold")
    failure = draw(picture, plot_lr, course.lr, course.steps_per_epoch, course.kinks)
    console.print(printable(failure or str(picture)), markup=False)


def time_line(config: RunConfig, spent: Cost) -> str:
    from fastcifar.device import device_name, resolve_device
    from fastcifar.runs.console import clock

    if spent.speed is None or spent.seconds is None:
        return f"not measured, since there is no {config.engine.device} here"
    device = device_name(resolve_device(config.engine.device))
    return (
        f"{clock(spent.seconds)}, from {spent.speed:,.0f} img/s in forward and backward passes of {spent.rehearsed} "
        f"images, uncompiled, on {device} in {spent.precision.name}"
    )


def rates(course: Outline, peak: float) -> Table:
    """A table of the learning rate at some steps, with the epochs done."""
    table = Table(box=None)
    for title in ("epoch", "step", "lr", "of the peak"):
        table.add_column(title, justify="right")
    for step in course.rows:
        rate = course.lr[step]
        table.add_row(f"{step / course.steps_per_epoch:.2f}", f"{step:,}", f"{rate:.4g}", f"{rate / peak:.1%}")
    return table
