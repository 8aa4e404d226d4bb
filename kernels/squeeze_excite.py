"""Squeeze-and-excitation: every channel scaled by a gate that a small network computes from the means of all channels.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507. Activations are NHWC. Where the addition
of a residual and the ReLU follow, they ride along.

A program holds whole samples in registers between pooling and scaling, and computes their gates itself: one launch
forward, and two backward, the second for the gradients of the weights. What is too large for that is left to the
reference (`fits`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .checks import check_activation, check_like, check_tensor, described
from .dispatch import launch, triton, use_triton
from .squeeze_excite_kernels import (
    WEIGHT_GRADIENT,
    blocks_of,
    fits,
    gradient_kernel,
    sizes_of,
    squeeze_excite_kernel,
    weight_gradient_kernel,
)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from changing the matrix products."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


@triton_op("fastcifar::squeeze_excite", mutates_args=())
def squeeze_excite_forward(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `squeeze_excite` together with what its gradient needs.

    Returns y and, in float32, pooled (N, C), hidden (N, R) and gate (N, C).
    """
    check(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual)
    if not (use_triton(x) and fits(x, reduce_weight)):
        with without_autocast(x.device):
            pooled = x.mean((2, 3), dtype=torch.float32)
            hidden = F.relu(F.linear(pooled, reduce_weight.float(), reduce_bias.float()))
            gate = F.linear(hidden, expand_weight.float(), expand_bias.float()).sigmoid()
        y = x * gate[:, :, None, None]
        y = y if residual is None else y + residual
        return (F.relu(y) if relu else y).to(x.dtype), pooled, hidden, gate

    sizes = samples, _, channels, reduced = sizes_of(x, reduce_weight)
    blocks = blocks_of(*sizes[1:])
    y = torch.empty_like(x)
    pooled, gate = (torch.empty((samples, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    hidden = torch.empty((samples, reduced), dtype=torch.float32, device=x.device)
    # Without a residual the kernel needs some pointer all the same, which it does not read.
    inputs = x, reduce_weight, reduce_bias, expand_weight, expand_bias, x if residual is None else residual
    flags = {"HAS_RESIDUAL": residual is not None, "RELU": relu}
    grid = (triton.cdiv(samples, blocks["BLOCK_N"]),)
    launch(wrap_triton(squeeze_excite_kernel), grid, y, pooled, hidden, gate, *inputs, *sizes, **flags, **blocks)
    return y, pooled, hidden, gate


# The gradients, with p a pixel of P, c a channel, u a hidden unit, and sums over what the left side lacks (the sample n
# only in weights and biases). Forward:
#
#     pooled_c = sum x_pc / P
#     hidden_u = relu(sum reduce_weight_uc pooled_c + bias)
#     gate_c = sigmoid(sum expand_weight_cu hidden_u + bias)
#     y_pc = relu(x_pc gate_c + residual_pc)
#
# Backward:
#
#     grad_pc = grad_y_pc + grad_skip_pc where the ReLU let y pass, else 0        grad_residual_pc = grad_pc
#     grad_expanded_c = gate_c (1 - gate_c) sum grad_pc x_pc
#     grad_hidden_u = [hidden_u > 0] sum expand_weight_cu grad_expanded_c
#     grad_pooled_c = sum reduce_weight_uc grad_hidden_u
#     grad_x_pc = grad_pc gate_c + grad_pooled_c / P
#     grad_reduce_weight_uc = sum grad_hidden_nu pooled_nc        its bias: sum grad_hidden_nu
#     grad_expand_weight_cu = sum grad_expanded_nc hidden_nu      its bias: sum grad_expanded_nc


@triton_op("fastcifar::squeeze_excite_backward", mutates_args=())
def squeeze_excite_backward(
    grad_y: Tensor,
    grad_skip: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    masks_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, residual, reduce_weight, reduce_bias, expand_weight and expand_bias.

    The last four are in the dtype of `reduce_weight`.

    Args:
        grad_y: (N, C, H, W), of the dtype of x, of any strides.
        grad_skip: like `grad_y`, the gradient of the result that a shortcut took; None where there is none.
        x: as given to `squeeze_excite`, as are `reduce_weight` and `expand_weight`.
        y: the result; None where there was no ReLU.
        pooled: as `squeeze_excite_forward` returned it, as are `hidden` and `gate`.
        masks_residual: whether the gradient of the residual is wanted and differs from `grad_y`; else it comes empty.
    """
    if not (use_triton(x) and fits(x, reduce_weight)):
        grad = grad_y if grad_skip is None else grad_y + grad_skip
        grad = grad if y is None else grad.masked_fill(y <= 0, 0)
        grad_expanded = (grad.float() * x).sum((2, 3)) * gate * (1 - gate)
        with without_autocast(x.device):
            grad_hidden = (grad_expanded @ expand_weight.float()).masked_fill(hidden <= 0, 0)
            grad_pooled = grad_hidden @ reduce_weight.float()
            of_weights = grad_hidden.T @ pooled, grad_hidden.sum(0), grad_expanded.T @ hidden, grad_expanded.sum(0)
        pixels = x.shape[2] * x.shape[3]
        grad_x = (grad * gate[:, :, None, None] + (grad_pooled / pixels)[:, :, None, None]).to(x.dtype)
        grad_residual = grad.clone() if masks_residual else grad.new_empty(0)
        return grad_x, grad_residual, *(gradient.to(reduce_weight.dtype) for gradient in of_weights)

    sizes = samples, _, channels, reduced = sizes_of(x, reduce_weight)
    blocks = blocks_of(*sizes[1:])
    flags = {"HAS_SKIP": grad_skip is not None, "RELU": y is not None, "MASKS_RESIDUAL": masks_residual}
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    # Without a shortcut or y the kernels need some pointer all the same, which they do not read.
    grad_skip = x if grad_skip is None else grad_skip.contiguous(memory_format=torch.channels_last)
    y = x if y is None else y
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if masks_residual else torch.empty(0, dtype=x.dtype, device=x.device)
    grad_expanded, grad_hidden = torch.empty_like(gate), torch.empty_like(hidden)
    outputs = grad_x, grad_residual, grad_expanded, grad_hidden
    inputs = grad_y, grad_skip, x, y, hidden, gate, reduce_weight, expand_weight
    grid = (triton.cdiv(samples, blocks["BLOCK_N"]),)
    launch(wrap_triton(gradient_kernel), grid, *outputs, *inputs, *sizes, **flags, **blocks)

    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    gradients = [torch.empty(shape, dtype=reduce_weight.dtype, device=x.device) for shape in shapes]
    grid = triton.cdiv(reduced, WEIGHT_GRADIENT["BLOCK_R"]), triton.cdiv(channels, WEIGHT_GRADIENT["BLOCK_C"])
    inputs = pooled, hidden, grad_hidden, grad_expanded, samples, channels, reduced
    launch(wrap_triton(weight_gradient_kernel), grid, *gradients, *inputs, **WEIGHT_GRADIENT)
    return grad_x, grad_residual, *gradients


class SqueezeExcite(torch.autograd.Function):
    """Joins the two ops; `torch.library` lets no op return a tensor twice."""

    @staticmethod
    def forward(ctx: Any, skip: bool, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        x, reduce_weight, _, expand_weight, _, residual, relu = arguments
        y, *intermediates = squeeze_excite_forward(*arguments)
        ctx.save_for_backward(x, y if relu else None, *intermediates, reduce_weight, expand_weight)
        ctx.has_residual, ctx.masks_residual = residual is not None, residual is not None and (relu or skip)
        # Autograd would take the same tensor twice for one, and add up both gradients itself.
        return (y, y.view_as(y)) if skip else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_skip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, y, pooled, hidden, gate, reduce_weight, expand_weight = ctx.saved_tensors
        grad_x, grad_residual, *of_weights = squeeze_excite_backward(
            grad_y, grad_skip, x, y, pooled, hidden, gate, reduce_weight, expand_weight, ctx.masks_residual
        )
        if not ctx.masks_residual:
            grad_residual = grad_y if ctx.has_residual else None
        return None, grad_x, *of_weights, grad_residual, None


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    skip: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scales each channel by its gate, then adds the residual and applies the ReLU.

    The gate is sigmoid(expand_weight relu(reduce_weight means + reduce_bias) + expand_bias).

    Computed in float32, under autocast too, and rounded once; the weights are not cast. Deterministic. Differentiable,
    once, in all tensors.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        reduce_weight: (R, C), contiguous, float32 or of the dtype of x.
        reduce_bias: (R,), contiguous, of the dtype of `reduce_weight`, as are the next two.
        expand_weight: (C, R), contiguous.
        expand_bias: (C,), contiguous.
        residual: like x; added after the scaling.
        relu: whether a ReLU comes last.
        skip: whether to return the result twice, the second for a shortcut, whose gradient the backward pass then adds
            by itself.

    Returns:
        y: like x, twice with `skip`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device.
    """
    return SqueezeExcite.apply(skip, x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)


def check(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
) -> None:
    check_activation("x", x)
    dtype, channels = reduce_weight.dtype, x.shape[1]
    if dtype not in (torch.float32, x.dtype):
        raise TypeError(f"reduce_weight must be float32 or, like x, {x.dtype}, not {dtype}.")
    if reduce_weight.dim() != 2 or 0 in reduce_weight.shape:
        raise ValueError(f"reduce_weight must be (R, C), not {described(reduce_weight)}.")
    reduced = len(reduce_weight)
    check_tensor("reduce_weight", reduce_weight, dtype, (reduced, channels), x.device)
    check_tensor("reduce_bias", reduce_bias, dtype, (reduced,), x.device)
    check_tensor("expand_weight", expand_weight, dtype, (channels, reduced), x.device)
    check_tensor("expand_bias", expand_bias, dtype, (channels,), x.device)
    check_like("residual", residual, x)
