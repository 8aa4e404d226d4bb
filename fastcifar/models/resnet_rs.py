"""ResNet-RS."""

from __future__ import annotations

from torch import nn

from fastcifar.models.resnet import ResNet


def resnetrs50(
    *,
    stem_channels: int = 32,
    stem_out: int | None = None,
    stem_stride: int = 2,
    entry_stride: int = 2,
    se_ratio: float = 1 / 16,
    dropout: float = 0.25,
    stochastic_depth: float = 0.0,
    weight_init: str = "he",
    classes: int = 10,
    image_size: int = 32,
) -> nn.Sequential:
    """ResNet-RS-50 (Bello et al. 2021, arXiv:2103.07579) as in report 2, which names the stem's width and gives no
    count of parameters.

    The reading: the width is that of the stem's first two convolutions and the third doubles it, as in the public codes
    that have such a setting. A strided 3x3 convolution of that many channels stands in place of max-pooling, and the
    first block of every stage has a convolution on its shortcut, as in the authors' code. For ten classes that is
    26,115,738 parameters at width 32 and 27,148,602 at width 128; at width 128 with `stem_out=64`, the stem's output in
    report 2's figure 1, it is 26,312,250.

    At the default strides the maps of a 32x32 image are 8, 4, 2 and 1 pixels wide; with both of the stem 1
    (`resnetrs50_cifar`), 32, 16, 8 and 4.

    Args:
        stem_channels: width of the stem's first two convolutions; report 2 tries 32 and 128.
        stem_out: channels of its third; twice its width by default.
        stem_stride: of its first convolution; report 2 tries 2 and 1.
        entry_stride: of the convolution in place of max-pooling.
        se_ratio: width within squeeze-and-excitation, in features of the block; the paper has 0.25, report 2 1/16.
        dropout: probability of dropping a feature before the linear layer.
        stochastic_depth, weight_init: as in `ResNet`.
        classes: number of classes.
        image_size: height and width of the images, in pixels.

    Raises:
        ConfigError: values that make no network.
    """
    return ResNet(
        blocks=(3, 4, 6, 3),
        block="bottleneck",
        resnet_d=True,
        stem_channels=stem_channels,
        stem_out=stem_out,
        stem_stride=stem_stride,
        entry_stride=entry_stride,
        se_ratio=se_ratio,
        dropout=dropout,
        stochastic_depth=stochastic_depth,
        weight_init=weight_init,
        classes=classes,
        image_size=image_size,
    ).build()
