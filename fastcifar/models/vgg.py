"""VGG with batch norm, for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastcifar.models.blocks import Pool, convolution, initialize_by_he
from fastcifar.models.layers import BatchNorm2d


def vgg(*, depths: tuple[int, ...], classes: int, image_size: int) -> nn.Sequential:
    """A VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) with norms: (N, 3, H, W) -> logits (N, classes).

    Stages of `depths` 3x3 convolutions, with 64, 128, 256, 512 and 512 channels, are each followed by 2x2 max-pooling;
    one linear layer stands for the three that ImageNet's maps need. The convolutions have no bias, since the norm after
    each takes it away again: VGG19 has 20,035,018 parameters for ten classes, and public codes for CIFAR 5,504 more.
    """
    width, stages = 3, []
    for channels, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        stage: list[nn.Module] = []
        for _ in range(depth):
            stage += [convolution(width, channels, 3), BatchNorm2d(channels, relu=True)]
            width = channels
        stages.append(nn.Sequential(*stage, nn.MaxPool2d(2, ceil_mode=True)))
    layers = {f"stage{number}": stage for number, stage in enumerate(stages, 1)}
    network = nn.Sequential(OrderedDict(**layers, pool=Pool(None), classifier=nn.Linear(width, classes)))
    initialize_by_he(network)
    return network
