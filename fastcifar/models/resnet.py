"""Residual networks for small images: the generic one, which those with a name are presets of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastcifar.checks import check_name
from fastcifar.errors import ConfigError
from fastcifar.models.blocks import BlockShape, Pool, PostActivation, PreActivation, convolution, deep_stem
from fastcifar.models.layers import BatchNorm2d

EXPANSION = {"basic": 1, "bottleneck": 4}
"""What each block puts out, in widths of its stage."""


def resnet(**options: Any) -> nn.Sequential:
    """The network that `ResNet(**options)` describes. Raises ConfigError where its values make none."""
    return ResNet(**options).build()


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """A residual network of `len(blocks)` stages: a stem, the stages (each after the first halves the map), pooling, a
    linear layer.

    Raises:
        ConfigError: values that make no network; the sentence names them.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    """Residual blocks of each stage."""
    channels: Sequence[int] = (64, 128, 256, 512)
    """Width of each stage; a bottleneck puts out four times as many."""
    kernels: Sequence[int] = (3,)
    """Convolution size of each stage, odd; one value serves all."""
    skip_kernels: Sequence[int] = (1,)
    """Size of the shortcut convolutions of each stage, odd; one value serves all."""
    stem_channels: int | None = None
    """Width of the stem; the first stage's by default."""
    stem_out: int | None = None
    """What a deep stem puts out; twice its width by default."""
    stem_stride: int = 1
    entry_stride: int = 1
    """The stride of the convolution that ends a deep stem."""
    resnet_d: bool = False
    """A deep stem; shortcuts that pool; a convolution on the shortcut of every stage's first block
    (arXiv:1812.01187, 2103.07579).
    """
    pool: int | None = None
    """Window of the average pooling; None pools the whole map."""
    pool_stride: int | None = None
    """The stride of the pooling; its window by default."""
    block: str = "basic"
    """Two convolutions (basic), or 1x1, one, and 1x1 (bottleneck). The first that is not 1x1 carries the stride."""
    groups: int = 1
    """The groups of the middle convolution of a bottleneck (ResNeXt, arXiv:1611.05431)."""
    group_width: int | None = None
    """Channels of each group in the first stage, growing as the stages do; by default the middle convolution has its
    stage's width.
    """
    pre_activation: bool = False
    """Norm and ReLU before each convolution, in place of after it."""
    final_norm: bool = False
    """With pre-activation, norm and ReLU before the pooling."""
    se_ratio: float = 0.0
    """Squeeze-and-excitation in every block, with so many times its features within; 0 for none."""
    block_dropout: float = 0.0
    """Between the convolutions of each block."""
    dropout: float = 0.0
    """Probability of dropping a feature before the linear layer."""
    stochastic_depth: float = 0.0
    """Probability of skipping the last block's branch; the l-th of L is skipped with l / L of it (arXiv:1603.09382)."""
    weight_init: str = "he"
    """How the convolutions begin: a name of `WEIGHT_INITS`."""
    classes: int = 10
    image_size: int = 32
    """Height and width, in pixels."""

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.channels):
            raise ConfigError(
                f"blocks names {len(self.blocks)} stages and channels {len(self.channels)}; give one number of each "
                "for every stage."
            )
        if min(*self.blocks, *self.channels, self.stem_width) < 1:
            raise ConfigError("blocks, channels and stem_channels must all be at least 1.")
        for name in ("stem_out", "stem_stride", "entry_stride", "pool", "pool_stride", "groups", "group_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more.")
        for name in ("se_ratio", "block_dropout", "dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not from 0 to below 1; give a value such as 0.25.")
        for name in ("kernels", "skip_kernels"):
            self.per_stage(name)
        check_name("weight_init", self.weight_init, WEIGHT_INITS)
        self.check_options()

    def check_options(self) -> None:
        """Raises ConfigError where one option needs another."""
        if self.block not in EXPANSION:
            raise ConfigError(f"block {self.block!r} is not known; choose one of {', '.join(EXPANSION)}.")
        if self.final_norm and not self.pre_activation:
            raise ConfigError("final_norm belongs to pre-activation networks; add pre_activation or leave it out.")
        if self.groups == 1 and self.group_width is not None:
            raise ConfigError("group_width belongs to groups; give groups above 1 or leave it out.")
        if self.groups > 1 and self.block != "bottleneck":
            raise ConfigError("groups belong to bottlenecks; choose the block bottleneck or leave them out.")
        for stage, width in enumerate(self.inner_widths, 1):
            if not width or width % self.groups:
                raise ConfigError(
                    f"{width} channels in stage {stage} do not divide into {self.groups} groups; change groups or "
                    "channels."
                )
        if self.pool_stride is not None and self.pool is None:
            raise ConfigError("pool_stride belongs to pool; give the window as well or leave it out.")
        if self.pool is not None and self.pool > self.last_size:
            size = self.last_size
            raise ConfigError(
                f"pool {self.pool} does not fit the last map of {size}x{size}; give a window from 1 to {size}, or "
                "leave it out."
            )

    @property
    def stem_width(self) -> int:
        return self.channels[0] if self.stem_channels is None else self.stem_channels

    @property
    def stem_features(self) -> int:
        """What the stem puts out."""
        return (self.stem_out or 2 * self.stem_width) if self.resnet_d else self.stem_width

    @property
    def inner_widths(self) -> list[int]:
        """Width of the middle convolutions, by stage."""
        if self.group_width is None:
            return list(self.channels)
        return [self.groups * self.group_width * channels // self.channels[0] for channels in self.channels]

    @property
    def last_size(self) -> int:
        """Height and width of the last stage's map, in pixels."""
        size = self.image_size
        for stride in (self.stem_stride, self.entry_stride if self.resnet_d else 1, *[2] * (len(self.blocks) - 1)):
            size = -(-size // stride)
        return size

    def per_stage(self, name: str) -> tuple[int, ...]:
        """One odd size a stage, from the field `name`, whose only value may serve all. Raises ConfigError."""
        values, stages = tuple(getattr(self, name)), len(self.blocks)
        values = values * stages if len(values) == 1 else values
        if len(values) != stages or any(value < 1 or value % 2 == 0 for value in values):
            numbers = " ".join(map(str, values))
            raise ConfigError(
                f"{name} {numbers} does not suit {stages} stages; give one odd size, or one for each stage."
            )
        return values

    def build(self) -> nn.Sequential:
        """The network, initialised: normalised images (N, 3, image_size, image_size) -> logits (N, classes)."""
        layers = self.stem()
        style = PreActivation if self.pre_activation else PostActivation
        for stage, shapes in enumerate(self.stages(), 1):
            layers[f"stage{stage}"] = nn.Sequential(*map(style, shapes))
        features = self.channels[-1] * EXPANSION[self.block]
        if self.final_norm:
            layers["final_norm"] = BatchNorm2d(features, relu=True)
        layers["pool"] = Pool(self.pool, self.pool_stride)
        if self.dropout:
            layers["dropout"] = nn.Dropout(self.dropout)
        windows = 1 if self.pool is None else (self.last_size - self.pool) // (self.pool_stride or self.pool) + 1
        layers["classifier"] = nn.Linear(features * windows**2, self.classes)
        network = nn.Sequential(OrderedDict(layers))
        WEIGHT_INITS[self.weight_init](network)
        return network

    def stem(self) -> dict[str, nn.Module]:
        """The layers before the stages, by name."""
        if self.resnet_d:
            return {"stem": deep_stem(self.stem_width, self.stem_features, self.stem_stride, self.entry_stride)}
        layers: dict[str, nn.Module] = {"stem": convolution(3, self.stem_width, 3, self.stem_stride)}
        # The first block of a pre-activation network begins with a norm of its own.
        return layers if self.pre_activation else layers | {"stem_norm": BatchNorm2d(self.stem_width, relu=True)}

    def stages(self) -> Iterator[list[BlockShape]]:
        """The shapes of the blocks of each stage."""
        kernels, skip_kernels = self.per_stage("kernels"), self.per_stage("skip_kernels")
        width, before = self.stem_features, 0
        for stage, blocks in enumerate(self.blocks):
            inner, outer = self.inner_widths[stage], self.channels[stage] * EXPANSION[self.block]
            shapes = []
            for i in range(blocks):
                basic, kernel = self.block == "basic", kernels[stage]
                shapes.append(
                    BlockShape(
                        channels=(width, inner, outer) if basic else (width, inner, inner, outer),
                        kernels=(kernel, kernel) if basic else (1, kernel, 1),
                        middle=0 if basic else 1,
                        stride=2 if stage and i == 0 else 1,
                        groups=self.groups,
                        skip_kernel=skip_kernels[stage],
                        project=self.resnet_d and i == 0,
                        pool_skip=self.resnet_d,
                        reduced=max(1, round(outer * self.se_ratio)) if self.se_ratio else 0,
                        skip_probability=self.stochastic_depth * (before + i + 1) / sum(self.blocks),
                        dropout=self.block_dropout,
                        followed=before + i + 1 < sum(self.blocks),
                    )
                )
                width = outer
            before += blocks
            yield shapes


def he(network: nn.Module) -> None:
    """Normal, with a variance of 2 over the fan-out (He et al. 2015, arXiv:1502.01852), in the convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def pytorch(network: nn.Module) -> None:
    """As PyTorch made them: uniform, with a variance of 1/3 over the fan-in, a sixth of He's, in the convolutions.

    A pre-activation network adds up its branches without a norm, so that its last map is as large as its branches are
    many. Where no norm stands before the classifier either, He's rule makes the first logits so large that a learning
    rate of 0.1 diverges unless it is reached very slowly; PyTorch's does not.
    """


WEIGHT_INITS = {"he": he, "pytorch": pytorch}
"""By name, what turns a network's convolutions, as PyTorch makes them, into what training begins with. Norms and
linear layers stay.
"""
