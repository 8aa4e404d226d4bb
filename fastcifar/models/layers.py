"""Layers with their own kernels: batch norm and squeeze-and-excitation, each with an optional addition and ReLU.

On a GPU each is one op of `fastcifar.kernels`. On a CPU, in float64 and under `FASTCIFAR_KERNELS=reference` it is the
plain expression, except that batch norm compiled for training on a CPU is `compiled_norm`.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.kernels.batch_norm import Skip, batch_norm_relu
from fastcifar.kernels.checks import FLOATS
from fastcifar.kernels.dispatch import use_triton
from fastcifar.kernels.squeeze_excite import squeeze_excite
from fastcifar.models.compiled_norm import CompiledNorm


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm, the addition of a residual and ReLU: (N, C, H, W) -> the same.

    The output has the input's dtype, under autocast too. The input may be a pair of tensors, which are added.

    It is `nn.BatchNorm2d`, except that `num_batches_tracked` costs a kernel launch a step and so begins with the first
    batch of a cumulative average (`momentum=None`, as `swa_utils.update_bn` sets it). In training on a GPU it is one
    op, with a channels_last result.
    """

    num_batches_tracked: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    momentum: float | None

    def __init__(self, channels: int, relu: bool = False) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", None, persistent=False)
        self.relu = relu

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked = None

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], residual: Tensor | None = None, skip: Skip | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalises `x`, adds `residual` if given, and returns the shortcut's input that `skip` selects, if any."""
        x, addend = x if isinstance(x, tuple) else (x, None)
        momentum = self.momentum if self.training else None
        if momentum is not None and takes_op(x, self.weight, residual, addend):
            parameters = self.weight, self.bias, self.running_mean, self.running_var
            how = {"momentum": momentum, "eps": self.eps, "relu": self.relu, "skip": skip}
            return batch_norm_relu(
                as_channels_last(x), *parameters, as_channels_last(residual), as_channels_last(addend), **how
            )
        x = x if addend is None else x + addend
        compiling = torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() > self.num_features
        if momentum is not None and compiling:
            y = self.compiled_for_cpu(x, residual, momentum)
        else:
            if self.training and self.momentum is None and self.num_batches_tracked is None:
                self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=x.device)
            y = add_and_activate(super().forward(x), residual, self.relu)
        return with_skip(y, x, skip)

    def compiled_for_cpu(self, x: Tensor, residual: Tensor | None, momentum: float) -> Tensor:
        y, mean, var = CompiledNorm.apply(x, residual, self.weight, self.bias, self.eps, self.relu)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            unbiased = x.numel() / (x.numel() - self.num_features)
            self.running_var.lerp_((var * unbiased).to(self.running_var.dtype), momentum)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Tells the base class that a file without version numbers, such as safetensors, rightly lacks the counter."""
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *rest)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels (Hu et al. 2018, arXiv:1709.01507).

    Two dense layers, with width `reduced` between them, compute the gates.

    The addition of a residual and a ReLU may follow. (N, C, H, W) -> the same, in the dtype of the input. Under
    autocast a GPU's gates are computed in float32, a CPU's in the autocast dtype.
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, relu: bool = False, skip: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scales `x`, adds `residual` if given, applies a ReLU if `relu`; returns the result twice with `skip`."""
        if takes_op(x, self.reduce.weight, residual):
            weights = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
            return squeeze_excite(as_channels_last(x), *weights, as_channels_last(residual), relu, skip)
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3))))).sigmoid()
        y = add_and_activate(x * gate[:, :, None, None], residual, relu)
        return (y, y) if skip else y


def takes_op(x: Tensor, weight: Tensor, *added: Tensor | None) -> bool:
    """Whether an op of `fastcifar.kernels` computes a layer.

    It does where kernels run, for an input of a supported float type, additions of the same, and float32 weights.
    """
    same_dtype = all(tensor is None or tensor.dtype == x.dtype for tensor in added)
    return use_triton(x) and x.dtype in FLOATS and weight.dtype == torch.float32 and same_dtype


def with_skip(y: Tensor, x: Tensor, skip: Skip | None) -> Tensor | tuple[Tensor, Tensor]:
    """Returns `y`, with the shortcut's input if `skip` is given: what was normalised, or the result again."""
    return y if skip is None else (y, x if skip == "input" else y)


@overload
def as_channels_last(x: Tensor) -> Tensor: ...


@overload
def as_channels_last(x: None) -> None: ...


def as_channels_last(x: Tensor | None) -> Tensor | None:
    """Converts to channels_last; returns `x` itself where it is so already, as after such a network's convolution."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def add_and_activate(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Adds `residual` if given, and applies a ReLU if `relu`."""
    x = x if residual is None else x + residual
    return F.relu(x) if relu else x
