"""Wide residual networks."""

from __future__ import annotations

from torch import nn

from fastcifar.errors import ConfigError
from fastcifar.models.resnet import ResNet


def wrn(
    *,
    depth: int = 28,
    widen: int = 10,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    weight_init: str = "he",
    classes: int = 10,
    image_size: int = 32,
) -> nn.Sequential:
    """A wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146): pre-activation, 16, 32 and 64 channels times
    `widen`.

    WRN-28-2 has 1,467,610 parameters for ten classes and WRN-28-10 36,479,194, as published.

    Args:
        depth: convolutions on the longest path, 6 n + 4 for n blocks a stage.
        widen: factor of the stages' width.
        dropout: probability of dropping a value between the two convolutions of each block.
        stochastic_depth, weight_init: as in `ResNet`.
        classes: number of classes.
        image_size: height and width of the images, in pixels.

    Raises:
        ConfigError: a depth of another form, or values that make no network.
    """
    if depth < 10 or depth % 6 != 4:
        raise ConfigError(f"depth {depth} makes no wide ResNet; give 6 n + 4, such as 16, 28 or 40.")
    if widen < 1:
        raise ConfigError(f"widen is {widen}; expected 1 or more.")
    return ResNet(
        blocks=(depth // 6,) * 3,
        channels=(16 * widen, 32 * widen, 64 * widen),
        stem_channels=16,
        pre_activation=True,
        final_norm=True,
        block_dropout=dropout,
        stochastic_depth=stochastic_depth,
        weight_init=weight_init,
        classes=classes,
        image_size=image_size,
    ).build()
