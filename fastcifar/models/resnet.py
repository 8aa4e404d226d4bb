"""The options of residual networks for small images; torch is imported only when one is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastcifar.checks import check_name, check_range
from fastcifar.errors import ConfigError

EXPANSION = {"basic": 1, "bottleneck": 4}
"""Output channels of each block, in widths of its stage."""

MOST_BLOCKS, LARGEST = 10_000, 1_000_000
"""Bounds of a network that can be described, though hardly trained, beyond which its sizes overflow 64 bits."""


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """A residual network: a stem, `len(blocks)` stages (each after the first halves the map), pooling, a linear layer.

    Raises:
        ConfigError: values that make no network; the sentence names them.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks of each stage."""
    channels: tuple[int, ...] = (64, 128, 256, 512)
    """Width of each stage; a bottleneck puts out four times as many channels."""
    kernels: tuple[int, ...] = (3,)
    """Convolution size of each stage, or one for all; odd."""
    skip_kernels: tuple[int, ...] = (1,)
    """Shortcut convolution size of each stage, or one for all; odd."""
    groups: int = 1
    """Groups of the middle convolution of a bottleneck (ResNeXt, arXiv:1611.05431)."""
    group_width: int | None = None
    """Channels of each group in the first stage, growing as the stages do; by default the middle convolution has its
    stage's width."""
    stem_channels: int | None = None
    """Width of the stem; the first stage's by default."""
    stem_out: int | None = None
    """Channels that a deep stem puts out; twice its width by default."""
    stem_stride: int = 1
    """Stride of the stem."""
    pool: int | None = None
    """Window of the average pooling; the whole map by default."""
    pool_stride: int | None = None
    """Stride of the average pooling; its window by default."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Residual block: two convolutions, or 1x1, one, and 1x1. The first that is not 1x1 carries the stride."""
    pre_activation: bool = False
    """Norm and ReLU before each convolution, in place of after it."""
    final_norm: bool = False
    """Norm and ReLU before the pooling of a pre-activation network, which then learns in short runs too."""
    se_ratio: float = 0.0
    """Squeeze-and-excitation in every block, with so many times its features within; none at 0."""
    dropout: float = 0.0
    """Probability of dropping a feature before the last layer; in wide ResNets, a value between the convolutions of a
    block."""
    stochastic_depth: float = 0.0
    """Probability of skipping the last block's residual branch; those before it are skipped linearly less
    (arXiv:1603.09382)."""
    weight_init: Literal["he", "pytorch"] = "he"
    """How the convolutions begin: by He's rule, or as PyTorch makes them."""

    block_dropout: float = 0.0
    """Probability of dropping a value between the convolutions of each block."""
    resnet_d: bool = False
    """A deep stem; shortcuts that pool; a convolution on the shortcut of every stage's first block
    (arXiv:1812.01187, 2103.07579)."""
    entry_stride: int = 1
    """Stride of the convolution that ends a deep stem."""
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
        widest = max(*self.channels, *self.inner_widths, self.stem_width, self.stem_features, *self.kernels)
        if sum(self.blocks) > MOST_BLOCKS or widest > LARGEST:
            raise ConfigError(
                f"blocks add up to {sum(self.blocks):,}, and the largest width or kernel is {widest:,}; expected at "
                f"most {MOST_BLOCKS:,} and {LARGEST:,}."
            )
        for name in ("stem_out", "stem_stride", "entry_stride", "pool", "pool_stride", "groups", "group_width"):
            check_range(name, getattr(self, name), 1, LARGEST)
        for name in ("se_ratio", "block_dropout", "dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not from 0 to below 1; give a value such as 0.25.")
        for name in ("kernels", "skip_kernels"):
            self.per_stage(name)
        check_name("weight_init", self.weight_init, ("he", "pytorch"))
        check_name("block", self.block, EXPANSION)
        self.check_together()

    def check_together(self) -> None:
        """Raises ConfigError where values do not fit together."""
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
        return (self.stem_out or 2 * self.stem_width) if self.resnet_d else self.stem_width

    @property
    def inner_widths(self) -> list[int]:
        """Widths of the middle convolutions, by stage."""
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
        """One odd size a stage, from the field `name`, which may have one value for all. Raises ConfigError."""
        values, stages = tuple(getattr(self, name)), len(self.blocks)
        values = values * stages if len(values) == 1 else values
        if len(values) != stages or any(value < 1 or value % 2 == 0 for value in values):
            numbers = " ".join(map(str, values))
            raise ConfigError(
                f"{name} {numbers} does not suit {stages} stages; give one odd size, or one for each stage."
            )
        return values
