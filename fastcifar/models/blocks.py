"""Residual blocks, stems, pooling, and the networks built of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.models.layers import BatchNorm2d, SqueezeExcite
from fastcifar.models.resnet import EXPANSION, ResNet


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A residual block: convolution i has size `kernels[i]` and widths `channels[i] -> channels[i + 1]`."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    """Sizes of the convolutions, odd."""
    stride: int = 1
    middle: int = 0
    """Index of the convolution with the stride and the groups."""
    groups: int = 1
    skip_kernel: int = 1
    """Size of the shortcut's convolution, odd."""
    project: bool = False
    """Use a convolution on the shortcut even where the shape stays."""
    pool_skip: bool = False
    """Halve the shortcut by 2x2 average pooling instead of a strided convolution (ResNet-D, arXiv:1812.01187)."""
    reduced: int = 0
    """Inner width of squeeze-and-excitation; 0 for none."""
    skip_probability: float = 0.0
    """Probability of skipping the branch in training (stochastic depth)."""
    dropout: float = 0.0
    """Probability of dropout before each convolution of the branch but the first, as in wide ResNets."""
    followed: bool = False
    """Whether another block follows."""

    @property
    def projects(self) -> bool:
        return self.project or self.stride != 1 or self.channels[0] != self.channels[-1]

    def convolution(self, i: int) -> nn.Conv2d:
        """The i-th convolution of the branch."""
        stride, groups = (self.stride, self.groups) if i == self.middle else (1, 1)
        return convolution(self.channels[i], self.channels[i + 1], self.kernels[i], stride, groups)

    def branch(self) -> nn.Sequential:
        """The convolutions of the branch, with norm and ReLU between them."""
        layers: list[nn.Module] = [self.convolution(0)]
        for i in range(1, len(self.kernels)):
            layers += [BatchNorm2d(self.channels[i], relu=True)]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            layers += [self.convolution(i)]
        return nn.Sequential(*layers)

    def shortcut(self) -> nn.Sequential:
        """The shortcut: a convolution, after average pooling if so chosen; empty where the shape stays."""
        if not self.projects:
            return nn.Sequential()
        if not self.pool_skip or self.stride == 1:
            return nn.Sequential(convolution(self.channels[0], self.channels[-1], self.skip_kernel, self.stride))
        # Rounds up, as strided convolutions do; the mean leaves out what lies beyond an odd edge.
        pool = nn.AvgPool2d(self.stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, convolution(self.channels[0], self.channels[-1], self.skip_kernel))


ONEDNN_CHANNELS = 16
"""From so many input channels on, oneDNN's strided 1x1 convolution is sound."""


class Subsampling(nn.Conv2d):
    """A 1x1 convolution with a stride that, in training on a CPU, first drops the pixels which the stride skips.

    With fewer than 16 input channels in channels_last, the backward pass of oneDNN, which torch calls there, writes
    beyond its memory on maps of about 50 pixels and more, and ends the process or spoils its values.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight)


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size at stride 1; `kernel` is odd."""
    unsound = kernel == groups == 1 and stride > 1 and in_channels < ONEDNN_CHANNELS
    kind = Subsampling if unsound else nn.Conv2d
    return kind(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class PostActivation(nn.Module):
    """A residual block with the activation after the addition (He et al. 2015, arXiv:1512.03385).

    The shortcut's convolution has a norm. (N, C, H, W) -> (N, C', H / stride, W / stride), rounded up. If another block
    follows, the output is a pair, for its branch and its shortcut, so that their gradients are added without a separate
    kernel.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        gated = bool(shape.reduced or shape.skip_probability)
        self.branch = shape.branch()
        self.norm = BatchNorm2d(shape.channels[-1], relu=not gated)
        self.followed = shape.followed
        self.merge = Merge(shape) if gated else None
        self.shortcut = shape.shortcut()
        if shape.projects:
            self.shortcut.append(BatchNorm2d(shape.channels[-1]))

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        x, again = x if isinstance(x, tuple) else (x, x)
        branch, shortcut = self.branch(x), self.shortcut(again)
        if self.merge is None:
            return self.norm(branch, shortcut, "output" if self.followed else None)
        return self.merge(self.norm(branch), shortcut, self.followed)


class PreActivation(nn.Module):
    """A residual block with norm and activation before each convolution (He et al. 2016, arXiv:1603.05027).

    Where the shape changes, the shortcut is a bare convolution of the activated input, else the untouched input. Shapes
    are as in `PostActivation`, but the output is the pair of branch and shortcut. The next layer adds them: the norm of
    the next block does so without a separate kernel.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm = BatchNorm2d(shape.channels[0], relu=True)
        self.branch = shape.branch()
        self.merge = Merge(shape)
        self.shortcut = shape.shortcut()
        self.projects = shape.projects

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.projects:
            activated = self.norm(x)
            shortcut = self.shortcut(activated)
        else:
            activated, shortcut = self.norm(x, skip="input")
        return self.merge(self.branch(activated)), shortcut


class Merge(nn.Module):
    """Applies squeeze-and-excitation, stochastic depth, and the addition of a shortcut with a ReLU, where given.

    With `skip` the result is returned twice.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.excite = SqueezeExcite(shape.channels[-1], shape.reduced) if shape.reduced else None
        self.depth = StochasticDepth(shape.skip_probability) if shape.skip_probability else None

    def forward(
        self, branch: Tensor, shortcut: Tensor | None = None, skip: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.excite is not None and self.depth is None:
            return self.excite(branch, shortcut, shortcut is not None, skip)
        if self.excite is not None:
            branch = self.excite(branch)
        if self.depth is not None:
            branch = self.depth(branch)
        y = branch if shortcut is None else F.relu(branch + shortcut)
        return (y, y) if skip else y


class StochasticDepth(nn.Module):
    """Zeroes each sample's branch with `probability` in training, and scales the others to keep the mean.

    Drawn for each sample on its device from torch's generator. Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 1 - self.probability
        alive = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < kept
        return x * (alive / kept).to(x.dtype)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.4g}"


def deep_stem(width: int, out_channels: int, stride: int, entry_stride: int) -> nn.Sequential:
    """ResNet-D's three 3x3 convolutions, the first strided, then ResNet-RS's strided one in place of max-pooling."""
    shapes = [
        (3, width, stride),
        (width, width, 1),
        (width, out_channels, 1),
        (out_channels, out_channels, entry_stride),
    ]
    layers: list[nn.Module] = []
    for in_channels, channels, step in shapes:
        layers += [convolution(in_channels, channels, 3, step), BatchNorm2d(channels, relu=True)]
    return nn.Sequential(*layers)


class Pool(nn.Module):
    """Average pooling over `size` x `size` windows, or the whole map for None: (N, C, H, W) -> (N, features).

    Windows are `stride` apart, `size` by default. What no window covers is not read: a 5x5 window on an 8x8 map sees
    only the top left corner. A pair of maps is added first.
    """

    def __init__(self, size: int | None, stride: int | None = None) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        x = x[0] + x[1] if isinstance(x, tuple) else x
        return x.mean((2, 3)) if self.size is None else F.avg_pool2d(x, self.size, self.stride).flatten(1)

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}"


def assemble(options: ResNet) -> nn.Sequential:
    """Builds the network: normalised images (N, 3, image_size, image_size) -> logits (N, classes)."""
    layers = stem(options)
    style = PreActivation if options.pre_activation else PostActivation
    for stage, shapes in enumerate(block_shapes(options), 1):
        layers[f"stage{stage}"] = nn.Sequential(*map(style, shapes))
    features, pool, stride = options.channels[-1] * EXPANSION[options.block], options.pool, options.pool_stride
    if options.final_norm:
        layers["final_norm"] = BatchNorm2d(features, relu=True)
    layers["pool"] = Pool(pool, stride)
    if options.dropout:
        layers["dropout"] = nn.Dropout(options.dropout)
    windows = 1 if pool is None else (options.last_size - pool) // (stride or pool) + 1
    layers["classifier"] = nn.Linear(features * windows**2, options.classes)
    network = nn.Sequential(OrderedDict(layers))
    if options.weight_init == "he":
        initialize_by_he(network)
    return network


def stem(options: ResNet) -> dict[str, nn.Module]:
    width, stride = options.stem_width, options.stem_stride
    if options.resnet_d:
        return {"stem": deep_stem(width, options.stem_features, stride, options.entry_stride)}
    layers: dict[str, nn.Module] = {"stem": convolution(3, width, 3, stride)}
    # The first block of a pre-activation network begins with its own norm.
    return layers if options.pre_activation else layers | {"stem_norm": BatchNorm2d(width, relu=True)}


def block_shapes(options: ResNet) -> Iterator[list[BlockShape]]:
    kernels, skip_kernels = options.per_stage("kernels"), options.per_stage("skip_kernels")
    width, before, depth = options.stem_features, 0, sum(options.blocks)
    basic = options.block == "basic"
    for stage, blocks in enumerate(options.blocks):
        inner, kernel = options.inner_widths[stage], kernels[stage]
        outer = options.channels[stage] * EXPANSION[options.block]
        shapes = []
        for i in range(blocks):
            shapes.append(
                BlockShape(
                    channels=(width, inner, outer) if basic else (width, inner, inner, outer),
                    kernels=(kernel, kernel) if basic else (1, kernel, 1),
                    middle=0 if basic else 1,
                    stride=2 if stage and i == 0 else 1,
                    groups=options.groups,
                    skip_kernel=skip_kernels[stage],
                    project=options.resnet_d and i == 0,
                    pool_skip=options.resnet_d,
                    reduced=max(1, round(outer * options.se_ratio)) if options.se_ratio else 0,
                    skip_probability=options.stochastic_depth * (before + i + 1) / depth,
                    dropout=options.block_dropout,
                    followed=before + i + 1 < depth,
                )
            )
            width = outer
        before += blocks
        yield shapes


def initialize_by_he(network: nn.Module) -> None:
    """Initialises convolutions from a normal with variance 2 / fan-out (He et al. 2015, arXiv:1502.01852).

    PyTorch's default is uniform with variance 1/3 over the fan-in, a sixth of He's. A pre-activation network adds up
    its branches without a norm, so its last map grows with their number. Without a norm before the classifier, He's
    rule makes the first logits so large that a learning rate of 0.1 diverges unless it is reached very slowly;
    PyTorch's does not.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
