"""Residual blocks and the layers they are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` without `num_batches_tracked`, which only a cumulative average reads and which costs a kernel launch a step."""

    num_batches_tracked: None  # type: ignore[assignment]

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        """Tells the base class that a file without version numbers, as safetensors is, lacks the counter on purpose."""
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *rest)


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size at stride 1; `kernel` is odd."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class PostActivation(nn.Module):
    """A residual branch with the activation after the addition (He et al. 2015, arXiv:1512.03385).

    `kernels` gives one convolution each, with the widths `channels[i] -> channels[i + 1]`; `strided` is the index of the convolution that
    carries the stride. Where the shape changes, the shortcut is a convolution with batch norm.
    (N, C, H, W) -> (N, C', H / stride, W / stride), rounded up.
    """

    def __init__(self, channels: tuple[int, ...], kernels: tuple[int, ...], stride: int, strided: int, skip_kernel: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers += [nn.ReLU()] if i else []
            layers += [convolution(channels[i], channels[i + 1], kernel, stride if i == strided else 1), BatchNorm2d(channels[i + 1])]
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels[0] != channels[-1]:
            self.shortcut = nn.Sequential(convolution(channels[0], channels[-1], skip_kernel, stride), BatchNorm2d(channels[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class PreActivation(nn.Module):
    """A residual branch with norm and activation before each convolution (He et al. 2016, arXiv:1603.05027).

    Arguments as in `PostActivation`. Where the shape changes, the shortcut is a bare convolution of the activated input, else the
    untouched input.
    """

    def __init__(self, channels: tuple[int, ...], kernels: tuple[int, ...], stride: int, strided: int, skip_kernel: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(channels[0])
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers += [BatchNorm2d(channels[i]), nn.ReLU()] if i else []
            layers += [convolution(channels[i], channels[i + 1], kernel, stride if i == strided else 1)]
        self.branch = nn.Sequential(*layers)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels[0] != channels[-1]:
            self.shortcut = convolution(channels[0], channels[-1], skip_kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm(x))
        return self.branch(activated) + (x if self.shortcut is None else self.shortcut(activated))


def basic(
    style: type[PostActivation | PreActivation], in_channels: int, width: int, kernel: int, skip_kernel: int, stride: int
) -> nn.Module:
    """Two `kernel` x `kernel` convolutions, the first strided."""
    return style((in_channels, width, width), (kernel, kernel), stride, 0, skip_kernel)


def bottleneck(
    style: type[PostActivation | PreActivation], in_channels: int, width: int, kernel: int, skip_kernel: int, stride: int
) -> nn.Module:
    """A 1x1, a `kernel` x `kernel` (strided) and a 1x1 convolution that widens to `4 * width`."""
    return style((in_channels, width, width, 4 * width), (1, kernel, 1), stride, 1, skip_kernel)


class Pool(nn.Module):
    """Average pooling over `size` x `size` windows, or the whole map where `size` is None: (N, C, H, W) -> (N, features)."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.size is None else F.avg_pool2d(x, self.size).flatten(1)
