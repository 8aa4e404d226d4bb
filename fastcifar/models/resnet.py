"""Residual networks for small images: the generic one, and those that have a name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from fastcifar.errors import ConfigError
from fastcifar.models.blocks import BatchNorm2d, Pool, PostActivation, PreActivation, basic, bottleneck, convolution

BLOCKS = {"basic": (basic, 1), "bottleneck": (bottleneck, 4)}


def resnet(
    *,
    blocks: Sequence[int] = (2, 2, 2, 2),
    channels: Sequence[int] = (64, 128, 256, 512),
    kernels: Sequence[int] = (3,),
    skip_kernels: Sequence[int] = (1,),
    stem_channels: int | None = None,
    pool: int | None = None,
    block: str = "basic",
    pre_activation: bool = False,
    final_norm: bool = False,
    dropout: float = 0.0,
    classes: int = 10,
    image_size: int = 32,
) -> nn.Sequential:
    """A residual network of `len(blocks)` stages: a 3x3 stem, the stages (each after the first halves the map), pooling, a linear layer.

    Args:
        blocks: residual blocks a stage.
        channels: width of each stage; a bottleneck puts out four times as many.
        kernels: convolution size of each stage, odd; one value serves all.
        skip_kernels: size of the shortcut convolutions of each stage, odd; one value serves all.
        stem_channels: width of the stem; the first stage's by default.
        pool: window of the average pooling, at stride `pool`; None pools the whole map.
        block: "basic" or "bottleneck".
        pre_activation: norm and ReLU before each convolution, in place of after it.
        final_norm: with pre-activation, norm and ReLU before the pooling.
        dropout: probability of dropping a feature before the linear layer.
        classes: number of classes.
        image_size: height and width of the images, in pixels.

    Raises:
        ConfigError: values that make no network; the sentence names them.
    """
    stages = len(blocks)
    kernels, skip_kernels = per_stage("kernels", kernels, stages), per_stage("skip_kernels", skip_kernels, stages)
    stem_channels = channels[0] if stem_channels is None and channels else stem_channels
    check_shape(blocks, channels, stem_channels, block, pre_activation, final_norm, dropout)
    build, expansion = BLOCKS[block]
    style = PreActivation if pre_activation else PostActivation
    width, size = stem_channels, image_size
    layers: dict[str, nn.Module] = {"stem": convolution(3, width, 3)}
    if not pre_activation:
        layers |= {"stem_norm": BatchNorm2d(width), "stem_relu": nn.ReLU()}
    for stage in range(stages):
        stage_blocks = []
        for i in range(blocks[stage]):
            stride = 2 if stage and i == 0 else 1
            stage_blocks.append(build(style, width, channels[stage], kernels[stage], skip_kernels[stage], stride))
            width, size = channels[stage] * expansion, (size + stride - 1) // stride
        layers[f"stage{stage + 1}"] = nn.Sequential(*stage_blocks)
    if final_norm:
        layers |= {"final_norm": BatchNorm2d(width), "final_relu": nn.ReLU()}
    if pool is not None and not 1 <= pool <= size:
        raise ConfigError(f"pool {pool} does not fit the last map of {size}x{size}; give a window from 1 to {size}, or leave it out.")
    layers["pool"] = Pool(pool)
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["classifier"] = nn.Linear(width * (1 if pool is None else (size // pool) ** 2), classes)
    return initialise(nn.Sequential(OrderedDict(layers)))


def per_stage(name: str, values: Sequence[int], stages: int) -> tuple[int, ...]:
    """One odd size a stage: `values`, or its only value repeated."""
    values = tuple(values) * stages if len(values) == 1 else tuple(values)
    if len(values) != stages or any(value < 1 or value % 2 == 0 for value in values):
        raise ConfigError(f"{name} {' '.join(map(str, values))} does not suit {stages} stages; give one odd size, or one for each stage.")
    return values


def check_shape(
    blocks: Sequence[int],
    channels: Sequence[int],
    stem_channels: int | None,
    block: str,
    pre_activation: bool,
    final_norm: bool,
    dropout: float,
) -> None:
    """Raises ConfigError where the values of `resnet` contradict each other."""
    if not blocks or len(blocks) != len(channels):
        raise ConfigError(f"blocks names {len(blocks)} stages and channels {len(channels)}; give one number of each for every stage.")
    if min(*blocks, *channels, stem_channels) < 1:
        raise ConfigError("blocks, channels and stem_channels must all be at least 1.")
    if block not in BLOCKS:
        raise ConfigError(f"block {block!r} is not known; choose one of {', '.join(BLOCKS)}.")
    if final_norm and not pre_activation:
        raise ConfigError("final_norm belongs to pre-activation networks; add pre_activation or leave it out.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout} is no probability below 1; give a value from 0 to 0.9.")


def initialise(network: nn.Sequential) -> nn.Sequential:
    """He initialisation of the convolutions by fan-out (arXiv:1502.01852); norms and the linear layer keep PyTorch's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet20_v2(*, final_norm: bool = False, dropout: float = 0.0, classes: int = 10, image_size: int = 32) -> nn.Sequential:
    """Report 1's ResNetV2-20: pre-activation, 16/32/64 channels, 272,154 parameters (272,282 with `final_norm`) for ten classes."""
    return resnet(
        blocks=(3, 3, 3),
        channels=(16, 32, 64),
        pre_activation=True,
        final_norm=final_norm,
        dropout=dropout,
        classes=classes,
        image_size=image_size,
    )


def resnet_prop(*, final_norm: bool = False, dropout: float = 0.0, classes: int = 10, image_size: int = 32) -> nn.Sequential:
    """Report 1's ResNetV2-Prop: a pre-activation ResNet-18, 11,171,146 parameters (11,172,170 with `final_norm`) for ten classes."""
    return resnet(pre_activation=True, final_norm=final_norm, dropout=dropout, classes=classes, image_size=image_size)


def resnet18(*, dropout: float = 0.0, classes: int = 10, image_size: int = 32) -> nn.Sequential:
    """ResNet-18 for 32x32 images, the baseline of reports 4 and 5: 11,173,962 parameters for ten classes."""
    return resnet(dropout=dropout, classes=classes, image_size=image_size)
