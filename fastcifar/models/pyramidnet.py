"""PyramidNet: every residual block is a little wider than the one before it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.checks import check_range
from fastcifar.models.blocks import Pool, convolution, initialize_by_he
from fastcifar.models.layers import BatchNorm2d
from fastcifar.models.resnet import EXPANSION


class PyramidBlock(nn.Module):
    """A bottleneck with a norm at both ends and no ReLU at either; (N, C, H, W) -> (N, C', H / stride, W / stride).

    The shortcut has no weights: it is averaged over 2x2 windows where the map shrinks, and its new channels are zeros.
    """

    def __init__(self, channels: int, width: int, stride: int, shake: ShakeDrop | None) -> None:
        super().__init__()
        outer = EXPANSION["bottleneck"] * width
        self.norm = BatchNorm2d(channels)
        self.branch = nn.Sequential(
            convolution(channels, width, 1),
            BatchNorm2d(width, relu=True),
            convolution(width, width, 3, stride),
            BatchNorm2d(width, relu=True),
            convolution(width, outer, 1),
        )
        self.last_norm = BatchNorm2d(outer)
        self.shake = shake
        self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        self.added = outer - channels

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.norm(x, skip="input")
        branch, shortcut = self.branch(y), F.pad(self.pool(x), (0, 0, 0, 0, 0, self.added))
        if self.shake is None:
            return self.last_norm(branch, shortcut)
        return self.shake(self.last_norm(branch)) + shortcut


class ShakeDrop(nn.Module):
    """Disturbs a branch in training (Yamada et al. 2019, arXiv:1802.02375): (N, C, H, W) -> the same.

    With `probability`, drawn once a batch, each image's branch is scaled by a factor drawn from -1 to 1, and its
    gradient by another, from 0 to 1. Evaluation scales by the mean factor, which is 1 - `probability`.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.probability)
        disturbed = torch.rand((), device=x.device) < self.probability
        forward, backward = torch.rand(2, x.shape[0], 1, 1, 1, device=x.device).unbind()
        forward, backward = (torch.where(disturbed, scale, 1.0).to(x.dtype) for scale in (2 * forward - 1, backward))
        # The value is forward * x, and since what is detached has no gradient, the gradient is that of backward * x.
        return backward * x + ((forward - backward) * x).detach()

    def extra_repr(self) -> str:
        return f"probability={self.probability:.4g}"


def pyramidnet(*, depth: int, alpha: int, shake_drop: float, classes: int, image_size: int) -> nn.Sequential:
    """An additive PyramidNet of bottlenecks (Han et al. 2017, arXiv:1610.02915): (N, 3, H, W) -> logits (N, classes).

    After a stem of 16 channels, three stages of (`depth` - 2) / 9 blocks each, whose width grows evenly by `alpha` in
    all. PyramidNet-272 with alpha 200 has 26,210,842 parameters for ten classes; the authors give 26.0 million.
    `shake_drop` is the probability in the last block, towards which it grows evenly.
    """
    check_range("shake_drop", shake_drop, 0, 1)
    stage_blocks = (depth - 2) // 9
    total = 3 * stage_blocks
    channels, blocks = 16, []
    for i in range(total):
        # Even from stage to stage, as in the authors' code, which adds alpha / total to a fraction before rounding it.
        width = round(16 + alpha * (i + 1) / total)
        shake = ShakeDrop(shake_drop * (i + 1) / total) if shake_drop else None
        blocks.append(PyramidBlock(channels, width, 2 if i in (stage_blocks, 2 * stage_blocks) else 1, shake))
        channels = EXPANSION["bottleneck"] * width
    layers: dict[str, nn.Module] = {"stem": convolution(3, 16, 3), "stem_norm": BatchNorm2d(16)}
    for stage in range(3):
        layers[f"stage{stage + 1}"] = nn.Sequential(*blocks[stage * stage_blocks : (stage + 1) * stage_blocks])
    layers |= {"norm": BatchNorm2d(channels, relu=True), "pool": Pool(None), "classifier": nn.Linear(channels, classes)}
    network = nn.Sequential(OrderedDict(layers))
    initialize_by_he(network)
    return network
