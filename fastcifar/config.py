"""Everything a run can be told, as one tree of frozen dataclasses, checked where they are built; free of torch."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import parse
from fastcifar.checks import check_name, check_range
from fastcifar.data.sources import is_known, unknown_dataset
from fastcifar.errors import ConfigError
from fastcifar.models import check_architecture
from fastcifar.optim import OPTIMIZERS, SHARPNESS, check_reads
from fastcifar.optim.schedules import AUTO, SCHEDULES, Duration
from fastcifar.serialization import build


def first(value: Any, default: Any) -> Any:
    """`value`, or `default` where it is None."""
    return default if value is None else value


@dataclass(frozen=True)
class ModelConfig:
    """The network. What is left out is the architecture's own; what it does not read is refused."""

    arch: str = "resnet_prop"
    """Architecture: one of these names, timm:NAME, or package.module:function; `fastcifar count --arch NAME`
    describes one.
    """
    blocks: tuple[int, ...] | None = None
    """Residual blocks of each stage."""
    channels: tuple[int, ...] | None = None
    """Width of each stage."""
    kernels: tuple[int, ...] | None = None
    """Convolution size of each stage, or one for all."""
    skip_kernels: tuple[int, ...] | None = None
    """Shortcut convolution size of each stage, or one for all."""
    depth: int | None = None
    """Convolutions and linear layers on the longest path, where the name does not say it."""
    widen: int | None = None
    """Factor of the stages' width in a wide ResNet."""
    groups: int | None = None
    """Groups of the middle convolution of a bottleneck."""
    group_width: int | None = None
    """Channels of each group in the first stage."""
    stem_channels: int | None = None
    """Width of the stem; the first stage's by default, 32 in resnetrs50."""
    stem_out: int | None = None
    """Channels that the stem of resnetrs50 puts out; twice its width by default."""
    stem_stride: int | None = None
    """Stride of the stem."""
    pool: int | None = None
    """Window of the average pooling; the whole map by default."""
    pool_stride: int | None = None
    """Stride of the average pooling; its window by default."""
    block: Literal["basic", "bottleneck"] | None = None
    """Residual block."""
    pre_activation: bool = False
    """Norm and ReLU before each convolution, in place of after it."""
    final_norm: bool | None = None
    """Norm and ReLU before the pooling of a pre-activation network; resnet_prop has it by default, to learn in short
    runs too.
    """
    se_ratio: float | None = None
    """Squeeze-and-excitation in every block, with so many times its features within; none by default (1/16 in
    resnetrs50), or 0.
    """
    dropout: float | None = None
    """Probability of dropping a feature before the last layer; in wide ResNets, a value between the convolutions of
    a block.
    """
    stochastic_depth: float | None = None
    """Probability of skipping the last block's residual branch; those before it are skipped linearly less."""
    weight_init: Literal["he", "pytorch"] | None = None
    """How the convolutions begin: by He's rule, or as PyTorch makes them, which the code behind reports 1 and 4
    kept.
    """
    max_params: float | None = None
    """Refuse a network of more parameters, such as 5e6."""

    def __post_init__(self) -> None:
        check_architecture(self.arch, self.options)
        check_range("max_params", self.max_params, 1)

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for besides the name, as keyword arguments of `build_model`."""
        own = ("arch", "max_params")
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in own and getattr(self, f.name) != f.default
        }


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
    """Augmentation policy: names and settings joined by commas, such as standard,cutout:1x16 or
    transform2,rotate:20.
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


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move. What is left out is the optimiser's own; what it does not read is refused."""

    optimizer: str = "sgd-nesterov"
    """Optimiser."""
    lr: float | None = None
    """Peak learning rate."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """Multiply the learning rate by the batch size over 128, or by the root of that."""
    momentum: float | None = None
    """Share of the momentum kept in a step."""
    weight_decay: float | None = None
    """Decay of the weights; decoupled from the gradient in adamw and muon."""
    decay_norms: bool = True
    """Whether norms and biases decay as well."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; unclipped by default."""
    sharpness: Literal["none", "sam", "asam"] = "none"
    """Step by the gradient at the worst point nearby (SAM), or nearby in relation to each weight (ASAM); doubles the
    work.
    """
    rho: float | None = None
    """Radius of that neighbourhood: 0.05 for SAM and 0.5 for ASAM by default."""
    eta: float | None = None
    """Added to each weight's magnitude by ASAM; 0.01 by default."""

    def __post_init__(self) -> None:
        check_name("optimiser", self.optimizer, OPTIMIZERS)
        check_reads(self.optimizer, {"momentum": self.momentum}, OPTIMIZERS[self.optimizer].reads, "optimiser")
        check_reads(self.sharpness, {"rho": self.rho, "eta": self.eta}, SHARPNESS[self.sharpness], "sharpness")
        check_range("lr", self.lr, 0, exclusive=True)
        check_range("momentum", self.momentum, 0, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("clip_norm", self.clip_norm, 0, exclusive=True)
        check_range("rho", self.rho, 0, exclusive=True)
        check_range("eta", self.eta, 0)

    @property
    def resolved(self) -> OptimConfig:
        """With what was left out filled in, where it is read."""
        own, radius = OPTIMIZERS[self.optimizer], {"none": None, "sam": 0.05, "asam": 0.5}[self.sharpness]
        return replace(
            self,
            lr=first(self.lr, own.lr),
            momentum=first(self.momentum, own.momentum),
            weight_decay=first(self.weight_decay, own.weight_decay),
            rho=first(self.rho, radius),
            eta=first(self.eta, 0.01 if self.sharpness == "asam" else None),
        )

    def peak_lr(self, batch_size: int) -> float:
        """The highest learning rate of a run."""
        ratio = batch_size / 128
        return self.resolved.lr * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.scale_lr]


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of the learning rate. What is left out is the schedule's own; what it does not read is refused."""

    schedule: str = "cosine"
    """Course of the learning rate after the warm-up; swa is constant, then linear, then constant."""
    warmup: str | None = None
    """Linear warm-up, such as 5ep (epochs), 2000st (steps) or 5% of the run; none before one-cycle, else by default
    `auto`: 5%, at least 200 steps, at most a quarter of the run."""
    per: Literal["step", "epoch"] | None = None
    """Whether the schedule moves on every step, as by default, or once an epoch; the warm-up always rises every
    step.
    """
    horizon: str | None = None
    """Where in the run the schedule comes to its end, which is then held; the end of the run by default. It may lie
    beyond.
    """
    start_lr: float | None = None
    """Share of the peak at the start: 1 by default in linear, 0.04 in one-cycle."""
    final_lr: float | None = None
    """Share of the peak at the end: 0 by default, 0.1 in swa, 0.000004 in one-cycle. In plateau, the lowest share."""
    milestones: tuple[str, ...] | None = None
    """Where in the run multistep falls; 30% 60% 80% by default."""
    step_size: str | None = None
    """Length of each step; 30% of what follows the warm-up by default."""
    gamma: float | None = None
    """Factor of each fall: 0.1 by default, 0.2 in multistep."""
    restart_period: str | None = None
    """Length of the first cycle (T_0) of warm-restarts; 25% of what follows the warm-up by default."""
    restart_factor: int | None = None
    """How many times as long each cycle is as the one before it (T_mult); 1 by default."""
    snapshots: bool = False
    """Keep the weights at the end of each cycle of warm-restarts, as members of an ensemble."""
    power: float | None = None
    """Exponent of polynomial; 1 by default, a straight line."""
    patience: int | None = None
    """Epochs without a lower loss after which plateau falls; 10 by default."""

    def __post_init__(self) -> None:
        check_name("schedule", self.schedule, SCHEDULES)
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("schedule", "warmup")}
        settings["snapshots"] = self.snapshots or None
        check_reads(
            self.schedule,
            settings,
            [name for name in SCHEDULES[self.schedule].defaults if name in settings],
            "schedule",
        )
        warmup = None if self.warmup == AUTO else self.warmup
        for text in (warmup, self.horizon, self.step_size, self.restart_period, *(self.milestones or ())):
            if text is not None:
                Duration.parse(text)
        check_range("start_lr", self.start_lr, 0, 1)
        check_range("final_lr", self.final_lr, 0, 1)
        check_range("gamma", self.gamma, 0, 1, exclusive=True)
        check_range("restart_factor", self.restart_factor, 1)
        check_range("power", self.power, 0, exclusive=True)
        check_range("patience", self.patience, 0)

    @property
    def resolved(self) -> ScheduleConfig:
        """With what was left out filled in, where it is read."""
        defaults = {"warmup": AUTO, **SCHEDULES[self.schedule].defaults}
        return replace(self, **{name: first(getattr(self, name), default) for name, default in defaults.items()})


LOSSES = {"cross-entropy": (), "asymmetric": ("gamma_pos", "gamma_neg")}
"""What each loss reads besides the smoothing."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    loss: Literal["cross-entropy", "asymmetric"] = "cross-entropy"
    """Loss, from the logits and labels."""
    label_smoothing: float | None = None
    """Share of the target spread over all classes; 0 by default, 0.1 in the asymmetric loss."""
    gamma_pos: float | None = None
    """Focusing of the right class in the asymmetric loss; 0 by default."""
    gamma_neg: float | None = None
    """Focusing of the other classes in the asymmetric loss; 4 by default."""
    teacher: Path | None = None
    """Folder of a run whose network's outputs are learnt as well (knowledge distillation)."""
    temperature: float | None = None
    """Softening of teacher's and student's outputs; 4 by default."""
    distill_weight: float | None = None
    """Share of the teacher in the loss; 0.9 by default."""

    def __post_init__(self) -> None:
        check_reads(self.loss, {"gamma_pos": self.gamma_pos, "gamma_neg": self.gamma_neg}, LOSSES[self.loss], "loss")
        if self.teacher is None and (self.temperature, self.distill_weight) != (None, None):
            raise ConfigError(
                "temperature and distill_weight belong to a teacher; add --teacher RUN or leave them out."
            )
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        check_range("gamma_pos", self.gamma_pos, 0)
        check_range("gamma_neg", self.gamma_neg, 0)
        check_range("temperature", self.temperature, 0, exclusive=True)
        check_range("distill_weight", self.distill_weight, 0, 1)

    @property
    def resolved(self) -> LossConfig:
        """With what was left out filled in, where it is read."""
        asymmetric, taught = self.loss == "asymmetric", self.teacher is not None
        return replace(
            self,
            label_smoothing=first(self.label_smoothing, 0.1 if asymmetric else 0.0),
            gamma_pos=first(self.gamma_pos, 0.0 if asymmetric else None),
            gamma_neg=first(self.gamma_neg, 4.0 if asymmetric else None),
            temperature=first(self.temperature, 4.0 if taught else None),
            distill_weight=first(self.distill_weight, 0.9 if taught else None),
        )


@dataclass(frozen=True)
class AverageConfig:
    """Averages of the weights, measured beside the weights themselves."""

    ema_decay: tuple[float, ...] = (0.999,)
    """Decays a step of exponential averages, at most four, each warmed up from 0; 0 keeps none."""
    swa_start: str | None = None
    """From here on, average the weights at the end of every epoch (SWA), such as 75%; batch norm statistics are
    measured anew.
    """

    def __post_init__(self) -> None:
        for decay in self.ema_decay:
            check_range("ema_decay", decay, 0, 1)
        if len(set(self.decays)) != len(self.decays) or len(self.decays) > 4:
            raise ConfigError(
                f"ema_decay {' '.join(map(str, self.ema_decay))} does not suit; give one to four different decays, "
                "or 0."
            )
        if self.swa_start is not None:
            Duration.parse(self.swa_start)

    @property
    def decays(self) -> tuple[float, ...]:
        """Those of the averages that are kept."""
        return tuple(decay for decay in self.ema_decay if decay)


@dataclass(frozen=True)
class EngineConfig:
    """On what, and in what manner, the run computes. `auto` is decided once, when the run starts, and stored with
    it.
    """

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
    """Images a pass; the gradient of a batch is the sum over its passes. All at once where memory allows, by
    default.
    """
    memory_limit: str | None = None
    """Stay within so much memory, such as 6GB (a GB being 2**30 bytes, as on cards); within what is free by default."""
    deterministic: bool = False
    """Only deterministic GPU algorithms; the CPU's always are."""

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise ConfigError(f"device {self.device!r} is not known; choose auto, cpu, cuda or cuda:INDEX.")
        check_range("threads", self.threads, 1)
        check_range("micro_batch", self.micro_batch, 1)
        if self.memory_limit is not None and not self.memory_limit_bytes:
            raise ConfigError(
                f"memory_limit {self.memory_limit!r} is no size; write gigabytes as 6GB, or megabytes as 900MB."
            )

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes; None where there is none, or none that can be read."""
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
