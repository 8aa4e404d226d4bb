"""Batch norm, addition and ReLU for training on a CPU, written for torch.compile: two loops over the activation each
way, and no more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CompiledNorm(torch.autograd.Function):
    """Batch norm by the batch's own statistics, the addition of a residual and ReLU. Source: Ioffe and Szegedy 2015,
    arXiv:1502.03167.

    PyTorch's own is decomposed into Welford's updates, divides and takes a root for every element, and hands rounded
    statistics to the backward pass of a half-precision activation. Here one loop sums deviations and their squares, and
    the values of a channel (mean, 1 / std) are results of the forward pass, which has the compiler store them once in
    place of computing them for each element.

    With d = x - s for any s, mean = s + E[d] and var = E[d^2] - E[d]^2, in which the less cancels, the nearer s is to
    the mean: s is the channel's first value, as far from the mean as the data themselves are.

    Backward, with xhat = (x - mean) / std, g the gradient where the ReLU is open, and n values a channel:
    d bias = sum(g), d weight = sum(g * xhat), d residual = g,
    d x = weight / std * (g - d bias / n - xhat * d weight / n).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` and `residual` (N, C, H, W), `weight` and `bias` (C,) -> the same as `x`, and the mean and the biased
        variance (C,).
        """
        values, share = widened(x), x.shape[1] / x.numel()
        shift = values[0, :, 0, 0]
        deviation = values - per_channel(shift)
        deviation_mean = deviation.sum((0, 2, 3)) * share
        var = ((deviation * deviation).sum((0, 2, 3)) * share - deviation_mean * deviation_mean).clamp_min(0)
        mean, rstd = shift + deviation_mean, (var + eps).rsqrt()
        y = (values - per_channel(mean)) * per_channel(rstd * weight) + per_channel(bias)
        y = y if residual is None else y + residual
        y = cast(y.relu() if relu else y, x.dtype)
        # Without a residual x tells where the ReLU is open, which spares reading y.
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, rstd)
        ctx.relu, ctx.has_residual = relu, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, rstd = ctx.saved_tensors
        share, centred, scale = x.shape[1] / x.numel(), widened(x) - per_channel(mean), rstd * weight
        g = widened(grad)
        if ctx.relu:
            g = torch.where((centred * per_channel(scale) + per_channel(bias) if y is None else y) > 0, g, 0.0)
        grad_bias, product = g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))
        slope, offset = scale * rstd * rstd * product * share, scale * grad_bias * share
        grad_x = per_channel(scale) * g - per_channel(slope) * centred - per_channel(offset)
        return (
            cast(grad_x, x.dtype),
            cast(g, x.dtype) if ctx.has_residual else None,
            product * rstd,
            grad_bias,
            None,
            None,
        )


def widened(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return cast(x, torch.promote_types(x.dtype, torch.float32))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, spared where it does nothing: torch 2.11, compiling a forward pass that ends so, loses the
    gradient.
    """
    return x if x.dtype == dtype else x.to(dtype)


def per_channel(values: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1)."""
    return values[:, None, None]
