"""The configuration of a run: a tree of frozen dataclasses, checked when built. Free of torch.

The settings of the network, the optimiser, the averages and the schedule are defined in `models` and `optim`, which
read them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import parse
from fastcifar.checks import check_name, check_range, check_reads, filled
from fastcifar.data.sources import is_known, unknown_dataset
from fastcifar.errors import ConfigError
from fastcifar.models import ModelConfig
from fastcifar.optim import AverageConfig, OptimConfig
from fastcifar.optim.schedules import ScheduleConfig
from fastcifar.serialization import build

__all__ = [
    "AverageConfig",
    "DataConfig",
    "EngineConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
]


@dataclass(frozen=True)
class DataConfig:
    """The images, and what is done to them on their way to the network."""

    dataset: str = "cifar10"
    """Data set: one of these names, or the path of a .npz file, a folder of .npy files, or one of pictures (at 48
    pixels: PATH@48). `auto` takes CIFAR-10 where it is at hand or quickly downloaded, else the built-in synthetic
    set."""
    data_dir: Path | None = None
    """Folder to look for the data set in, before $FASTCIFAR_DATA and the user cache."""
    val_split: int = 0
    """Training images set apart for validation, the same share of each class."""
    split_seed: int = 0
    """Seed of their draw, apart from the run's own, so that runs of several seeds set the same images apart."""
    augment: str = "standard"
    """Augmentation policy: names and settings joined by commas, such as standard,cutout:1x16 or transform2,rotate:20.
    """
    normalize: str = "true"
    """Mean and deviation of the colours; true has the data set's own."""
    loader: str = "auto"
    """Augmentation backend; auto takes what the device can use."""
    chunk_size: int | None = None
    """Images augmented at once; suited to the device by default."""

    def __post_init__(self) -> None:
        if self.dataset != "auto" and not is_known(self.dataset):
            raise ConfigError(unknown_dataset(self.dataset))
        parse(self.augment)
        check_name("normalisation", self.normalize, NORMALIZATIONS)
        check_name("loader", self.loader, ("auto", *BACKENDS))
        check_range("val_split", self.val_split, 0)
        check_range("split_seed", self.split_seed, 0, 2**32 - 1)
        check_range("chunk_size", self.chunk_size, 1)


LOSSES: dict[str, dict[str, float]] = {
    "cross-entropy": {"label_smoothing": 0.0},
    "asymmetric": {"label_smoothing": 0.1, "gamma_pos": 0.0, "gamma_neg": 4.0},
}
"""The settings of `LossConfig` that each loss reads, with the values that stand for None."""

DISTILLATION = {"temperature": 4.0, "distill_weight": 0.9}
"""The settings that distillation from a teacher reads, with their defaults."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    loss: Literal["cross-entropy", "asymmetric"] = "cross-entropy"
    """Loss, from the logits and labels."""
    label_smoothing: float | None = None
    """Share of the target spread over all classes."""
    gamma_pos: float | None = None
    """Focusing of the right class in the asymmetric loss."""
    gamma_neg: float | None = None
    """Focusing of the other classes in the asymmetric loss."""
    teacher: Path | None = None
    """Folder of a run whose network's outputs are learnt as well (knowledge distillation)."""
    temperature: float | None = None
    """Softening of teacher's and student's outputs."""
    distill_weight: float | None = None
    """Share of the teacher in the loss."""

    def __post_init__(self) -> None:
        check_name("loss", self.loss, LOSSES)
        given = {"gamma_pos": self.gamma_pos, "gamma_neg": self.gamma_neg}
        check_reads("loss", self.loss, given, LOSSES[self.loss])
        if self.teacher is None and (self.temperature, self.distill_weight) != (None, None):
            raise ConfigError(
                "temperature and distill_weight belong to a teacher; add --teacher RUN or leave them out."
            )
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        for name, gamma in given.items():
            check_range(name, gamma, 0, 100)
            if gamma is not None and 0 < gamma < 1:
                raise ConfigError(
                    f"{name} is {gamma}, which gives the loss an infinite slope; expected 0 or from 1 on."
                )
        check_range("temperature", self.temperature, 0, exclusive=True)
        check_range("distill_weight", self.distill_weight, 0, 1)

    @property
    def resolved(self) -> LossConfig:
        """Returns a copy with None replaced by the default where the setting is read."""
        return filled(self, LOSSES[self.loss] | (DISTILLATION if self.teacher is not None else {}))


MOST_THREADS = 1024
"""CPU threads that may be asked for; the process would die where the system refuses to start so many."""


@dataclass(frozen=True)
class EngineConfig:
    """The device, and how the run computes on it. `auto` is resolved once at the start of a run, and stored."""

    device: str = "auto"
    """Where to compute; auto takes a GPU where there is one, and cuda:1 the second one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the convolutions; auto takes bf16 where native, else fp16 (GPU), else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile; auto does where it pays for the length of the run."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Record steps as CUDA graphs, which the host launches whole; auto does where it can."""
    threads: int | None = None
    """CPU threads; torch's own choice by default."""
    micro_batch: int | None = None
    """Images a pass; the gradient of a batch is the sum over its passes. All at once where memory allows, by default.
    """
    memory_limit: str | None = None
    """Stay within so much memory, such as 6GB (a GB being 2**30 bytes, as on cards); within what is free by default."""
    deterministic: bool = False
    """Only deterministic GPU algorithms; the CPU's always are."""

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise ConfigError(f"device {self.device!r} is not known; choose auto, cpu, cuda or cuda:INDEX.")
        check_range("threads", self.threads, 1, MOST_THREADS)
        check_range("micro_batch", self.micro_batch, 1)
        if self.memory_limit is not None and not self.memory_limit_bytes:
            raise ConfigError(
                f"memory_limit {self.memory_limit!r} is no size; write gigabytes as 6GB, or megabytes as 900MB."
            )

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes; None where it is not given or cannot be read."""
        size = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([GM])B", self.memory_limit or "", re.IGNORECASE)
        return size and int(float(size[1]) * {"G": 2**30, "M": 2**20}[size[2].upper()])


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run.

    `to_json` and `from_json` keep it in a file.

    Raises:
        ConfigError: a value out of range, an unknown name, or an option that the architecture does not read.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    epochs: int = 200
    """Passes over the training set, the last batch left out where it is not full."""
    batch_size: int = 128
    """Images a step."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""
    watch_test: bool = False
    """Evaluate the test set after every epoch, as the reports did; the record says so."""
    recipe: str | None = None
    """Recipe to start from, which further flags override; `fastcifar recipes` lists them."""

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 1)
        check_range("batch_size", self.batch_size, 1, 2**31 - 1)
        check_range("seed", self.seed, 0, 2**32 - 1)

    def to_json(self) -> str:
        """The complete configuration as JSON; equal configurations give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "the configuration") -> RunConfig:
        """Builds the configuration from JSON; what is missing has its default.

        Raises:
            ConfigError: not JSON, unknown keys, wrong types or values; the sentence begins with `where`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}); give the config.json of a run.") from error
        return build(RunConfig, data, where)
