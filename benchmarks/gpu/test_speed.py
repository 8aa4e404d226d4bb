"""Images a second of training on a GPU, for networks with a target, loaders and runs at once."""

from __future__ import annotations

import pytest
import torch
from timing import measure, seconds

from fastcifar.cli import parse
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import dali_installed
from fastcifar.data.synthetic import synthetic
from fastcifar.device import matmul_flops_per_second, peak_memory_bytes
from fastcifar.engine.setup import prepare_machine, resolve
from fastcifar.engine.trainer import Trainer

NETWORKS = ("resnet20_v2", "resnet_prop")
EAGER = [f"--arch {network} --batch-size {size} --compile off" for size in (128, 512, 1024) for network in NETWORKS]
LOADERS = [
    f"--arch resnet20_v2 --batch-size 512 --compile off --augment {policy} --loader {loader}"
    for policy in ("standard", "standard,autoaugment")
    for loader in ("dali", "triton")
]
COMPILED = [flags.replace("off", "on") for flags in EAGER]
FLAGS = [*EAGER, *LOADERS, f"{EAGER[0]} --capture off", *COMPILED]
REPEATS = 5
AT_ONCE = 4
STEPS = 400


def trainer_of(flags: list[str]) -> tuple[Trainer, list[str]]:
    """Returns a trainer with as many images as CIFAR-10 has, and what was printed; the pictures do not affect speed."""
    config, notes = resolve(parse(["train", "--dataset", "synthetic", "--epochs", "100", *flags]).run)
    prepare_machine(config.engine)
    drawn = synthetic("train")
    images, labels = drawn.images.repeat(REPEATS, 1, 1, 1), drawn.labels.repeat(REPEATS)
    trainer = Trainer(config, ImageSet(images, labels, drawn.classes, drawn.mean, drawn.std))
    return trainer, [*notes, f"compiling: {trainer.compile()}", f"capturing: {trainer.capture()}"]


@pytest.mark.parametrize(
    "flags", [pytest.param(flags, marks=pytest.mark.takes(60 if flags in COMPILED else 20)) for flags in FLAGS]
)
def test_training(benchmark, device, flags, tiny):
    if "dali" in flags and not dali_installed():
        pytest.skip("NVIDIA DALI is not installed")
    trainer, notes = trainer_of([*flags.split(), *tiny])
    engine = trainer.config.engine
    rate = trainer.steps_per_epoch * trainer.config.batch_size / measure(benchmark, trainer.run_epoch, device, rounds=3)
    possible = matmul_flops_per_second(trainer.device, trainer.precision.dtype)
    benchmark.extra_info.update(
        images_per_second=rate,
        flop_utilization=rate * trainer.count.training_flops / possible,
        setup_seconds=trainer.clock.seconds["compile"],
        precision=engine.precision,
        loader=trainer.loader.backend,
        compiled="on" if trainer.launch.compiled else "off",
        captured="on" if trainer.launch.captured else "off",
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        notes=notes,
    )


@pytest.mark.takes(40)
def test_packed(device, record_property, tiny):
    """Compares runs on streams of one process, whose steps are launched in turn, with one alone."""
    one, several = (rate_together(count, device, tiny) for count in (1, AT_ONCE))
    record_property("images_per_second", several)
    record_property("times_one", several / one)


def rate_together(count: int, device: torch.device, flags: list[str]) -> float:
    """Returns the images a second of `count` runs together, after as many steps to warm up."""
    courses = []
    for _ in range(count):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            trainer = trainer_of(["--arch", "resnet20_v2", "--compile", "off", *flags])[0]
            courses.append((stream, trainer, trainer.endless_batches()))

    def train() -> None:
        for _ in range(STEPS):
            for stream, trainer, batches in courses:
                with torch.cuda.stream(stream):
                    trainer.launch(*next(batches))
                    trainer.state.batch += 1

    train()
    return count * STEPS * courses[0][1].config.batch_size / seconds(train, device)
