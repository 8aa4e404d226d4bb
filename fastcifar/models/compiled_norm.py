"""Batch norm, addition and ReLU for CPU training under torch.compile: two loops over the activation each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CompiledNorm(torch.autograd.Function):
    """Batch norm by batch statistics, with the addition of a residual and ReLU. Source: arXiv:1502.03167.

    PyTorch's own (Ioffe and Szegedy 2015) decomposes into Welford's updates, divides and takes a root for every
    element, and passes rounded statistics to the backward pass of half-precision activations. Here one loop sums
    deviations and their squares, and the values of a channel (mean, 1 / std) are outputs of the forward pass, so that
    the compiler stores them once instead of computing them for each element.

    With d = x - s for any s, mean = s + E[d] and var = E[d^2] - E[d]^2. The nearer s is to the mean, the less cancels;
    s is the channel's first value, as far from the mean as the data themselves.

    Backward, with xhat = (x - mean) / std, g the gradient where the ReLU is open, and n values a channel:
    d bias = sum(g), d weight = sum(g * xhat), d residual = g,
    d x = weight / std * (g - d bias / n - xhat * d weight / n).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes `x` and `residual` (N, C, H, W), `weight` and `bias` (C,).

        Returns the output, which is like `x`, and the mean and the biased variance (C,).
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
        # Without a residual, x tells where the ReLU is open, which saves reading y.
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
    """Casts `x` to at least float32."""
    return cast(x, torch.promote_types(x.dtype, torch.float32))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, skipped where it does nothing: torch 2.11 loses the gradient of a compiled forward ending so."""
    return x if x.dtype == dtype else x.to(dtype)


def per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
