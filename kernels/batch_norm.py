"""Batch norm for training, channels last, with the additions and the ReLU around it.

Source: Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate
shift", 2015, arXiv:1502.03167.

An activation (N, C, H, W), channels last, is a matrix of N * H * W rows and C columns. Each direction takes two
launches: the first reduces parts of the rows, the second combines the few partial results, each program for its own
channels, and goes over the rows again. Where the rows are few, the second does without the first and goes over all of
them twice. There are no atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .batch_norm_kernels import (
    input_gradient_kernel,
    normalize_kernel,
    reduce_gradient_kernel,
    split,
    statistics_kernel,
)
from .checks import check_activation, check_like, check_tensor
from .dispatch import launch, use_triton

Skip = Literal["input", "output"]
"""What a shortcut takes: the tensor that is normalised, or the result."""


def matrix_of(x: Tensor) -> tuple[int, int]:
    """Returns the rows and channels of an activation (N, C, H, W).

    They are numbers even where a graph is traced for all sizes, since kernels depend on them.
    """
    count, channels, height, width = (int(length) for length in x.shape)
    return count * height * width, channels


@triton_op("fastcifar::batch_norm_relu_forward", mutates_args={"running_mean", "running_var"})
def batch_norm_relu_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    addend: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_relu` for arguments that it has checked; carries no gradient.

    Returns:
        y, like `x`; the statistics, float32 (2, C), which are the mean and 1 / sqrt(variance + eps); and `x + addend`,
        empty without an addend.
    """
    if not use_triton(x):
        total = x if addend is None else x + addend
        y, mean, rstd = torch.ops.aten._native_batch_norm_legit(
            total, weight, bias, running_mean, running_var, True, momentum, eps
        )
        y = y if residual is None else y + residual
        y = F.relu(y) if relu else y
        # The statistics are float32 already, but torch's fakes do not know it.
        return y, torch.stack((mean, rstd)).float(), x.new_empty(0) if addend is None else total

    rows, channels = matrix_of(x)
    how = split(rows, channels)
    y = torch.empty_like(x)
    saved = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    partials = torch.empty((how.grid[0], 2, channels), dtype=torch.float32, device=x.device)
    has_addend = addend is not None
    total = torch.empty_like(x) if has_addend else torch.empty(0, dtype=x.dtype, device=x.device)
    # Without an addend or a residual the kernels need some pointer all the same, which they neither read nor write.
    of_sum = (total, x, addend) if has_addend else (x, x, x)
    if how.parts > 1:
        kernel = wrap_triton(statistics_kernel)
        launch(kernel, how.grid, partials, *of_sum, rows, channels, HAS_ADDEND=has_addend, **how.blocks)
        if has_addend:
            of_sum, has_addend = (total, total, total), False
    inputs = *of_sum, x if residual is None else residual, weight, bias, partials
    arguments = y, saved, running_mean, running_var, *inputs, rows, channels, momentum, eps
    flags = {"HAS_ADDEND": has_addend, "HAS_RESIDUAL": residual is not None, "RELU": relu}
    launch(wrap_triton(normalize_kernel), how.grid, *arguments, **flags, PARTS=how.parts, **how.blocks)
    return y, saved, total


@triton_op("fastcifar::batch_norm_relu_backward", mutates_args=())
def batch_norm_relu_backward(
    grad_y: Tensor,
    grad_skip: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    skip: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `batch_norm_relu_forward`, whose arguments `weight`, `bias` and `relu` are.

    Args:
        grad_y: (N, C, H, W) in the dtype of `x`, of any strides.
        grad_skip: like `grad_y`, the gradient of what the shortcut takes; None where there is none.
        x: what was normalised: with an addend, the sum.
        y: the result; None where there was no ReLU, or no residual before it.
        statistics: float32 (2, C), as `batch_norm_relu_forward` returned them.
        skip: what the shortcut takes.

    Returns:
        The gradients of x, weight and bias, and that of the residual, which is empty where y is None.
    """
    if not use_triton(x):
        mean, rstd = statistics
        g = grad_y if grad_skip is None or skip == "input" else grad_y + grad_skip
        if relu:
            z = (x - mean[:, None, None]) * (rstd * weight)[:, None, None] + bias[:, None, None] if y is None else y
            g = g.masked_fill(z <= 0, 0)
        # In any other layout torch rounds the gradients of weight and bias to half precision.
        g = torch.empty_like(x).copy_(g)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, rstd, True, 0.0, [True, True, True]
        )
        grad_x = grad_x + grad_skip if skip == "input" else grad_x
        return grad_x, grad_weight, grad_bias, x.new_empty(0) if y is None else g

    rows, channels = matrix_of(x)
    how = split(rows, channels)
    from_y = y is not None
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if from_y else torch.empty(0, dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    partials = torch.empty((how.grid[0], 2, channels), dtype=torch.float32, device=x.device)
    # Without a residual, y or a shortcut the kernels need some pointer all the same, which they do not use.
    of_residual, y = (grad_residual, y) if from_y else (grad_x, x)
    grad_skip = x if grad_skip is None else grad_skip.contiguous(memory_format=torch.channels_last)
    g = grad_y.contiguous(memory_format=torch.channels_last)
    others = grad_skip, x, y, weight, bias, statistics
    flags = {"SKIP_OF_Y": skip == "output", "FROM_Y": from_y, "RELU": relu}
    if how.parts > 1:
        kernel = wrap_triton(reduce_gradient_kernel)
        launch(kernel, how.grid, partials, of_residual, g, *others, rows, channels, **flags, **how.blocks)
        if from_y:
            g, flags = grad_residual, dict.fromkeys(flags, False)
    arguments = grad_x, grad_weight, grad_bias, of_residual, g, *others, partials, rows, channels
    flags |= {"SKIP_OF_X": skip == "input", "PARTS": how.parts}
    launch(wrap_triton(input_gradient_kernel), how.grid, *arguments, **flags, **how.blocks)
    return grad_x, grad_weight, grad_bias, grad_residual


class BatchNormReLU(torch.autograd.Function):
    """Joins the two ops.

    `torch.library` registers no gradient for an op that writes its arguments, here the running statistics.
    """

    @staticmethod
    def forward(ctx: Any, skip: Skip | None, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        x, weight, bias, _, _, residual, addend, _, _, relu = arguments
        y, statistics, total = batch_norm_relu_forward(*arguments)
        x = x if addend is None else total
        ctx.relu, ctx.skip, ctx.masks_residual = relu, skip, relu and residual is not None
        ctx.has_residual, ctx.has_addend = residual is not None, addend is not None
        ctx.save_for_backward(x, y if ctx.masks_residual else None, weight, bias, statistics)
        if skip is None:
            return y
        # Autograd would take the same tensor twice for one, and add up both gradients itself.
        return y, x if skip == "input" else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_skip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, statistics = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, masked = batch_norm_relu_backward(
            grad_y, grad_skip, x, y, weight, bias, statistics, ctx.relu, ctx.skip
        )
        grad_residual = None
        if ctx.masks_residual:
            grad_residual = masked
        elif ctx.has_residual:
            grad_residual = grad_y if grad_skip is None or ctx.skip == "input" else grad_y + grad_skip
        grad_addend = grad_x if ctx.has_addend else None
        return None, grad_x, grad_weight, grad_bias, None, None, grad_residual, grad_addend, None, None, None


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    skip: Skip | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises per channel as in training, adds a residual and applies a ReLU; differentiable once.

    Computes relu((x - mean) / sqrt(variance + eps) * weight + bias + residual), (N, C, H, W) like `x`.

    Mean and variance are those of `x`, or of `x + addend`, in float32, and the running statistics move towards them as
    in `nn.BatchNorm2d`.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, channels last.
        weight: (C,) float32, contiguous, on the device of `x`, as are the next three.
        bias: (C,) float32.
        running_mean: (C,) float32; written in place.
        running_var: (C,) float32; written in place, with the unbiased variance.
        residual: like `x` in shape, dtype, layout and device, added before the ReLU; None for nothing.
        addend: like `x`, added to `x` before it is normalised; None for nothing.
        momentum: the share of the new statistics in the running ones.
        eps: added to the variance.
        relu: whether to end with a ReLU.
        skip: what to return as well for a shortcut, whose gradient the backward pass then adds without a kernel of its
            own: "input", the tensor that is normalised, or "output", the result once more.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `x` has one row.
    """
    check_activation("x", x)
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have more than one value per channel, which its shape {tuple(x.shape)} has not.")
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        check_tensor(name, vector, torch.float32, x.shape[1:2], x.device)
    check_like("residual", residual, x)
    check_like("addend", addend, x)
    return BatchNormReLU.apply(skip, x, *vectors.values(), residual, addend, momentum, eps, relu)
