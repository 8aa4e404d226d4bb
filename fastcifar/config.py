"""Everything a run can be told, as one tree of frozen dataclasses, checked where they are built; free of torch."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union

from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import parse
from fastcifar.data.sources import is_known, unknown_dataset
from fastcifar.errors import ConfigError, unknown
from fastcifar.models import check_architecture
from fastcifar.optim.schedules import SCHEDULES, Duration


@dataclass(frozen=True)
class ModelConfig:
    """The network. What is left out is the architecture's own; what it does not read is refused."""

    arch: str = "resnet_prop"
    """Architecture; `fastcifar count --arch NAME` describes one."""
    blocks: tuple[int, ...] | None = None
    """Residual blocks of each stage."""
    channels: tuple[int, ...] | None = None
    """Width of each stage."""
    kernels: tuple[int, ...] | None = None
    """Convolution size of each stage, or one for all."""
    skip_kernels: tuple[int, ...] | None = None
    """Shortcut convolution size of each stage, or one for all."""
    stem_channels: int | None = None
    """Width of the stem; the first stage's by default."""
    pool: int | None = None
    """Window of the average pooling; the whole map by default."""
    block: str | None = None
    """Residual block: basic or bottleneck."""
    pre_activation: bool = False
    """Norm and ReLU before each convolution, in place of after it."""
    final_norm: bool = False
    """Norm and ReLU before the pooling of a pre-activation network."""
    dropout: float | None = None
    """Probability of dropping a feature before the last layer."""

    def __post_init__(self) -> None:
        check_architecture(self.arch, self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for besides the name, as keyword arguments of `build_model`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arch" and getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class DataConfig:
    """The images, and what is done to them on their way to the network."""

    dataset: str = "cifar10"
    """Data set: a name, or the path of a .npz file, a folder of .npy files, or one of pictures (at 48 pixels: PATH@48). `auto` takes
    CIFAR-10 where it is at hand or quickly downloaded, else the built-in synthetic set."""
    data_dir: Path | None = None
    """Folder to look for the data set in, before $FASTCIFAR_DATA and the user cache."""
    val_split: int = 0
    """Training images set apart for validation, the same share of each class."""
    augment: str = "standard"
    """Augmentation policy: names and settings joined by commas, such as standard,cutout:1x16 or transform2,rotate:20."""
    normalize: str = "true"
    """Mean and deviation: true (the data set's own), kuangliu, half or none."""
    loader: str = "auto"
    """Augmentation backend: auto, dali, torch or triton."""
    chunk_size: int | None = None
    """Images augmented at once; suited to the device by default."""

    def __post_init__(self) -> None:
        if self.dataset != "auto" and not is_known(self.dataset):
            raise ConfigError(unknown_dataset(self.dataset))
        parse(self.augment)
        check_name("normalisation", self.normalize, NORMALIZATIONS)
        check_name("loader", self.loader, ("auto", *BACKENDS))
        check_range("val_split", self.val_split, 0)
        check_range("chunk_size", self.chunk_size, 1)


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move."""

    optimizer: Literal["sgd"] = "sgd"
    """Optimiser; sgd has Nesterov momentum unless `momentum` is 0."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """Decay of all weights, coupled with the learning rate."""
    schedule: str = "cosine"
    """Course of the learning rate after the warm-up: cosine or constant."""
    warmup: str = "5%"
    """Linear warm-up, such as 5ep (epochs), 2000st (steps) or 5% of the run."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; unclipped by default."""
    ema_decay: float = 0.999
    """Decay a step of the averaged weights, warmed up from 0; 0 keeps no average."""

    def __post_init__(self) -> None:
        check_name("schedule", self.schedule, SCHEDULES)
        check_range("lr", self.lr, 0, exclusive=True)
        check_range("momentum", self.momentum, 0, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        check_range("clip_norm", self.clip_norm, 0, exclusive=True)
        check_range("ema_decay", self.ema_decay, 0, 1)
        Duration.parse(self.warmup)


@dataclass(frozen=True)
class EngineConfig:
    """On what, and in what manner, the run computes. `auto` is decided once, when the run starts, and stored with it."""

    device: str = "auto"
    """cuda, cuda:1, cpu, or auto: a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the convolutions: bf16 where native, else fp16 (GPU), else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: on, off, or where it pays for the length of the run."""
    threads: int | None = None
    """CPU threads; torch's own choice by default."""
    deterministic: bool = False
    """Only deterministic GPU algorithms; the CPU's always are."""

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise ConfigError(f"device {self.device!r} is not known; choose auto, cpu, cuda or cuda:INDEX.")
        check_range("threads", self.threads, 1)


@dataclass(frozen=True)
class RunConfig:
    """A whole run; `to_json` and `from_json` keep it in a file.

    Raises:
        ConfigError: a value out of range, an unknown name, or an option that the architecture does not read.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    epochs: int = 200
    """Passes over the training set, the last batch left out where it is not full."""
    batch_size: int = 128
    """Images a step."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""
    watch_test: bool = False
    """Evaluate the test set after every epoch, as the reports did; the record says so."""
    recipe: str | None = None
    """The recipe to start from; further flags override it."""

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 1)
        check_range("batch_size", self.batch_size, 1)
        check_range("seed", self.seed, 0, 2**32 - 1)

    def to_json(self) -> str:
        """The complete configuration; equal configurations give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "the configuration") -> RunConfig:
        """The configuration in `text`; what it leaves out has its default.

        Raises:
            ConfigError: not JSON, unknown keys, wrong types or values; the sentence begins with `where`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}); give the config.json of a run.") from error
        return build(RunConfig, data, where)


def check_name(kind: str, name: str, valid: typing.Iterable[str]) -> None:
    """Raises ConfigError, with the nearest names, where `name` is not among `valid`."""
    if name not in set(valid):
        raise ConfigError(unknown(kind, name, valid))


def check_range(name: str, value: float | None, low: float, high: float = float("inf"), *, exclusive: bool = False) -> None:
    """Raises ConfigError where `value` is given and below `low`, above `high`, or, if `exclusive`, equal to `low`."""
    if value is None or (low <= value <= high and not (exclusive and value == low)):
        return
    expected = f"above {low}" if exclusive else f"{low} or more"
    if high != float("inf"):
        expected = f"above {low}, at most {high}" if exclusive else f"{low} to {high}"
    raise ConfigError(f"{name} is {value}; expected {expected}.")


def build(kind: Any, value: Any, where: str, *, complete: bool = False) -> Any:
    """`value`, as read from JSON, in the type `kind`.

    Args:
        kind: a dataclass, a TypedDict, or the type of one of their fields.
        value: what `json.loads` returned.
        where: what the error's sentence begins with.
        complete: whether every key of a dataclass must be there, those with a default too; of a TypedDict they always must.

    Raises:
        ConfigError: keys are missing or unknown, or a value is of another type or refused by the dataclass.
    """
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return build_record(kind, value, where, complete)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else build(arguments[0], value, where, complete=complete)
    if origin in (tuple, list) and isinstance(value, list):
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(kinds) == len(value):
            return origin(build(part, entry, where) for part, entry in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: build(arguments[1], entry, f"{where}: {key}") for key, entry in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if kind is Any or (origin is Literal and value in arguments) or (isinstance(kind, type) and type(value) is kind):
        return value
    expected = " or ".join(map(str, arguments)) if origin is Literal else kind.__name__ if isinstance(kind, type) else str(kind)
    raise ConfigError(f"{where} is {reprlib.repr(value)}; expected {expected}.")


def build_record(kind: Any, value: Any, where: str, complete: bool) -> Any:
    """`build` for a dataclass or a TypedDict."""
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {reprlib.repr(value)}; expected an object with the keys {', '.join(hints)}.")
    for key in value:
        if key not in hints:
            raise ConfigError(f"{where}: {unknown('key', key, hints)}")
    needed = hints if complete or typing.is_typeddict(kind) else ()
    if missing := [key for key in needed if key not in value]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}, so it is damaged or another version's.")
    entries = {key: build(hints[key], entry, f"{where}: {key}", complete=complete) for key, entry in value.items()}
    try:
        return kind(**entries)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
