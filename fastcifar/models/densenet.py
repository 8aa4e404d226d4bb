"""DenseNet-BC: every layer reads the maps of all layers before it in its block."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastcifar.models.blocks import Pool, convolution, initialize_by_he
from fastcifar.models.layers import BatchNorm2d

BOTTLENECK = 4
"""Width of a layer's 1x1 convolution, in growth rates."""


class DenseLayer(nn.Sequential):
    """Appends `growth` maps to its input: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, channels: int, growth: int) -> None:
        inner = BOTTLENECK * growth
        super().__init__(
            BatchNorm2d(channels, relu=True),
            convolution(channels, inner, 1),
            BatchNorm2d(inner, relu=True),
            convolution(inner, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, super().forward(x)), 1)


def densenet(*, blocks: tuple[int, ...], growth: int, classes: int, image_size: int) -> nn.Sequential:
    """A DenseNet-BC (Huang et al. 2017, arXiv:1608.06993) for small images: (N, 3, H, W) -> logits (N, classes).

    The stem is one 3x3 convolution of 2 `growth` channels without a norm, as in the authors' networks for CIFAR.
    Between the blocks a 1x1 convolution halves the channels, and 2x2 average pooling the map (an odd edge counts too).
    With (6, 12, 24, 16) layers and a growth of 32 it is DenseNet-121, with 6,956,298 parameters for ten classes.
    """
    width = 2 * growth
    layers: dict[str, nn.Module] = {"stem": convolution(3, width, 3)}
    for number, depth in enumerate(blocks, 1):
        layers[f"block{number}"] = nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(depth)))
        width += depth * growth
        if number < len(blocks):
            layers[f"transition{number}"] = nn.Sequential(
                BatchNorm2d(width, relu=True), convolution(width, width // 2, 1), nn.AvgPool2d(2, ceil_mode=True)
            )
            width //= 2
    layers |= {"norm": BatchNorm2d(width, relu=True), "pool": Pool(None), "classifier": nn.Linear(width, classes)}
    network = nn.Sequential(OrderedDict(layers))
    initialize_by_he(network)
    return network
