"""Squeeze-and-excitation: every channel scaled by a gate that a small network computes from the means of all channels.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507. Activations are NHWC. Where the addition
of a residual and the ReLU follow, they ride along.

A program holds whole samples in registers between pooling and scaling, and computes their gates itself: one launch
forward, and two backward, the second for the gradients of the weights. What is too large for that is left to the
reference (`fits`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .compilation import Compilation
from .dispatch import jit, launcher, tl, triton, use_triton
from .spec import Arguments, Case, OpSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Eight warps hold 32 values of each tensor a thread, sixteen those of a sample twice as large. With more samples, or
# more hidden units at once, a program shares what it reads of the weights, but spills. Eight units are a sector of
# `expand_weight`. Chosen by the compiled code.
TILE, WARPS = 8192, 8
LARGEST_SAMPLE = 2 * TILE
MOST_SAMPLES, MOST_UNITS = 2, 8
PRODUCTS = 16384

# A program reads both weights through the L2: for 512 channels 128 KB in float32, which takes about 1 us at a
# multiprocessor's share of it, at this limit 2 MB, about 20 us (computed, not timed).
LARGEST_WEIGHT = 1 << 18

# Tiles of the gradients of the weights: small, since their matrices are.
WEIGHT_GRADIENT = {"BLOCK_N": 32, "BLOCK_R": 16, "BLOCK_C": 32}


def squeeze_excite_reference(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    skip: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `squeeze_excite` computes, in plain torch: in float32, rounded once."""
    y = _forward_reference(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)[0]
    return (y, y) if skip else y


def _forward_reference(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and in float32 what the gradient needs: pooled (N, C), hidden (N, R) and gate (N, C)."""
    with _full_precision(x.device):
        pooled = x.mean((2, 3), dtype=torch.float32)
        hidden = F.relu(F.linear(pooled, reduce_weight.float(), reduce_bias.float()))
        gate = F.linear(hidden, expand_weight.float(), expand_bias.float()).sigmoid()
    y = x * gate[:, :, None, None]
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    return y.to(x.dtype), pooled, hidden, gate


def _backward_reference(
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
    """What `squeeze_excite_backward` computes, in plain torch; its derivation stands there."""
    grad = grad_y if grad_skip is None else grad_y + grad_skip
    grad = grad if y is None else grad.masked_fill(y <= 0, 0)
    grad_expanded = (grad.float() * x).sum((2, 3)) * gate * (1 - gate)
    with _full_precision(x.device):
        grad_hidden = (grad_expanded @ expand_weight.float()).masked_fill(hidden <= 0, 0)
        grad_pooled = grad_hidden @ reduce_weight.float()
        grad_reduce_weight = grad_hidden.T @ pooled
        grad_expand_weight = grad_expanded.T @ hidden
    pixels = x.shape[2] * x.shape[3]
    grad_x = (grad * gate[:, :, None, None] + (grad_pooled / pixels)[:, :, None, None]).to(x.dtype)
    grad_residual = grad.clone() if masks_residual else grad.new_empty(0)
    of_weights = grad_reduce_weight, grad_hidden.sum(0), grad_expand_weight, grad_expanded.sum(0)
    return grad_x, grad_residual, *(gradient.to(reduce_weight.dtype) for gradient in of_weights)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from the matrix products."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


@jit
def squeeze_excite_kernel(
    y_ptr,
    pooled_ptr,
    hidden_ptr,
    gate_ptr,
    x_ptr,
    reduce_weight_ptr,
    reduce_bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    residual_ptr,
    samples,
    pixels,
    channels,
    reduced,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    sample, pixel, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    is_sample, is_channel = sample < samples - first, channel < channels
    means, is_mean = sample[:, None] * channels + channel[None, :], is_sample[:, None] & is_channel[None, :]
    values = (sample[:, None, None] * pixels + pixel[None, :, None]) * channels + channel[None, None, :]
    is_value = is_mean[:, None, :] & (pixel < pixels)[None, :, None]
    x = tl.load(x_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    pooled = tl.sum(x, 1) / pixels
    tl.store(pooled_ptr + first * channels + means, pooled, is_mean)

    # A block of hidden units is complete at once, since a program holds all channels, and adds its share to all gates.
    expanded = (
        tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        + tl.load(expand_bias_ptr + channel, is_channel, 0).to(tl.float32)[None, :]
    )
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        is_unit = unit < reduced
        is_weight = is_unit[:, None] & is_channel[None, :]
        reduce_weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0).to(
            tl.float32
        )
        expand_weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0).to(
            tl.float32
        )
        bias = tl.load(reduce_bias_ptr + unit, is_unit, 0).to(tl.float32)
        hidden = tl.sum(reduce_weight[None, :, :] * pooled[:, None, :], 2) + bias[None, :]
        hidden = tl.where(hidden < 0, 0.0, hidden)
        units, is_hidden = sample[:, None] * reduced + unit[None, :], is_sample[:, None] & is_unit[None, :]
        tl.store(hidden_ptr + first * reduced + units, hidden, is_hidden)
        expanded += tl.sum(expand_weight[None, :, :] * hidden[:, :, None], 1)
    gate = tl.sigmoid(expanded)
    tl.store(gate_ptr + first * channels + means, gate, is_mean)

    y = x * gate[:, None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + first * pixels * channels + values, y.to(y_ptr.dtype.element_ty), is_value)


@jit
def gradient_kernel(
    grad_x_ptr,
    grad_residual_ptr,
    grad_expanded_ptr,
    grad_hidden_ptr,
    grad_y_ptr,
    grad_skip_ptr,
    x_ptr,
    y_ptr,
    hidden_ptr,
    gate_ptr,
    reduce_weight_ptr,
    expand_weight_ptr,
    samples,
    pixels,
    channels,
    reduced,
    HAS_SKIP: tl.constexpr,
    RELU: tl.constexpr,
    MASKS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    sample, pixel, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    is_sample, is_channel = sample < samples - first, channel < channels
    means, is_mean = sample[:, None] * channels + channel[None, :], is_sample[:, None] & is_channel[None, :]
    values = (sample[:, None, None] * pixels + pixel[None, :, None]) * channels + channel[None, None, :]
    is_value = is_mean[:, None, :] & (pixel < pixels)[None, :, None]
    grad = tl.load(grad_y_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    if HAS_SKIP:
        grad += tl.load(grad_skip_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    if RELU:
        # Unlike y > 0, this lets the gradient of a nan pass, as in torch.
        grad = tl.where(tl.load(y_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32) <= 0, 0.0, grad)
    if MASKS_RESIDUAL:
        masked = grad.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + first * pixels * channels + values, masked, is_value)
    x = tl.load(x_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    gate = tl.load(gate_ptr + first * channels + means, is_mean, 0)
    grad_expanded = tl.sum(grad * x, 1) * gate * (1 - gate)
    tl.store(grad_expanded_ptr + first * channels + means, grad_expanded, is_mean)

    grad_pooled = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        is_weight = (unit < reduced)[:, None] & is_channel[None, :]
        expand_weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0).to(
            tl.float32
        )
        reduce_weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0).to(
            tl.float32
        )
        units, is_hidden = sample[:, None] * reduced + unit[None, :], is_sample[:, None] & (unit < reduced)[None, :]
        hidden = tl.load(hidden_ptr + first * reduced + units, is_hidden, 0)
        grad_hidden = tl.where(hidden <= 0, 0.0, tl.sum(expand_weight[None, :, :] * grad_expanded[:, None, :], 2))
        tl.store(grad_hidden_ptr + first * reduced + units, grad_hidden, is_hidden)
        grad_pooled += tl.sum(reduce_weight[None, :, :] * grad_hidden[:, :, None], 1)

    grad_x = grad * gate[:, None, :] + (grad_pooled / pixels)[:, None, :]
    tl.store(grad_x_ptr + first * pixels * channels + values, grad_x.to(grad_x_ptr.dtype.element_ty), is_value)


@jit
def weight_gradient_kernel(
    grad_reduce_weight_ptr,
    grad_reduce_bias_ptr,
    grad_expand_weight_ptr,
    grad_expand_bias_ptr,
    pooled_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    grad_expanded_ptr,
    samples,
    channels,
    reduced,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums the gradients of both weights and biases over the batch, one program for a tile of (R, C): no atomics, one
    order of summation.

    One launch, where matrix products and sums in torch would be four, and casts to the dtype of the weights four more.
    """
    unit = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_reduce_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    of_expand_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    of_reduce_bias = tl.zeros((BLOCK_R,), tl.float32)
    of_expand_bias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, samples, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        units = sample[None, :] * reduced + unit[:, None]
        is_unit = (sample < samples)[None, :] & (unit < reduced)[:, None]
        all_channels = sample[:, None] * channels + channel[None, :]
        is_channel = (sample < samples)[:, None] & (channel < channels)[None, :]
        grad_hidden = tl.load(grad_hidden_ptr + units, is_unit, 0)
        pooled = tl.load(pooled_ptr + all_channels, is_channel, 0)
        of_reduce_weight = tl.dot(grad_hidden, pooled, of_reduce_weight, input_precision="ieee")
        of_reduce_bias += tl.sum(grad_hidden, 1)
        hidden = tl.load(hidden_ptr + units, is_unit, 0)
        grad_expanded = tl.load(grad_expanded_ptr + all_channels, is_channel, 0)
        of_expand_weight = tl.dot(hidden, grad_expanded, of_expand_weight, input_precision="ieee")
        of_expand_bias += tl.sum(grad_expanded, 0)

    dtype = grad_reduce_weight_ptr.dtype.element_ty
    is_weight = (unit < reduced)[:, None] & (channel < channels)[None, :]
    tl.store(
        grad_reduce_weight_ptr + unit[:, None] * channels + channel[None, :], of_reduce_weight.to(dtype), is_weight
    )
    tl.store(grad_expand_weight_ptr + channel[None, :] * reduced + unit[:, None], of_expand_weight.to(dtype), is_weight)
    if tl.program_id(1) == 0:
        tl.store(grad_reduce_bias_ptr + unit, of_reduce_bias.to(dtype), unit < reduced)
    if tl.program_id(0) == 0:
        tl.store(grad_expand_bias_ptr + channel, of_expand_bias.to(dtype), channel < channels)


def fits(x: Tensor, reduce_weight: Tensor) -> bool:
    """Whether the kernels take these: a program holds a whole sample, and reads both weights."""
    # Sizes are compiled into the kernels' blocks, so that they are numbers even where a graph is traced for all sizes.
    reduced, channels, pixels = int(reduce_weight.shape[0]), int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    return _power_of_2(pixels) * _power_of_2(channels) <= LARGEST_SAMPLE and channels * reduced <= LARGEST_WEIGHT


def _power_of_2(length: int) -> int:
    """The smallest that is not below `length`."""
    return 1 << (length - 1).bit_length()


def _blocks(pixels: int, channels: int, reduced: int) -> dict[str, int]:
    """The constexprs and warps of the kernels that hold whole samples."""
    block_p, block_c = _power_of_2(pixels), _power_of_2(channels)
    samples = max(1, min(MOST_SAMPLES, TILE // (block_p * block_c)))
    units = max(1, min(MOST_UNITS, _power_of_2(reduced), PRODUCTS // (samples * block_c)))
    warps = WARPS if block_p * block_c <= TILE else 2 * WARPS
    return {"BLOCK_N": samples, "BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_R": units, "num_warps": warps}


@launcher
def launch_squeeze_excite(
    kernel: Any,
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `kernel`, which is `squeeze_excite_kernel` or its wrapped form, over new outputs."""
    samples, channels, pixels = len(x), int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    reduced = int(reduce_weight.shape[0])
    blocks = _blocks(pixels, channels, reduced)
    y = torch.empty_like(x)
    pooled, gate = (torch.empty((samples, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    hidden = torch.empty((samples, reduced), dtype=torch.float32, device=x.device)
    kernel[(triton.cdiv(samples, blocks["BLOCK_N"]),)](
        y,
        pooled,
        hidden,
        gate,
        x,
        reduce_weight,
        reduce_bias,
        expand_weight,
        expand_bias,
        x if residual is None else residual,  # Some pointer, which is not read.
        samples,
        pixels,
        channels,
        reduced,
        HAS_RESIDUAL=residual is not None,
        RELU=relu,
        **blocks,
    )
    return y, pooled, hidden, gate


@launcher
def launch_squeeze_excite_backward(
    kernel: Any,
    of_weights: Any,
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
    """Launches `gradient_kernel` and `weight_gradient_kernel`, or their wrapped forms, over new outputs."""
    samples, channels, pixels = len(x), int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    reduced = int(reduce_weight.shape[0])
    blocks = _blocks(pixels, channels, reduced)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    grad_skip = grad_skip if grad_skip is None else grad_skip.contiguous(memory_format=torch.channels_last)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if masks_residual else torch.empty(0, dtype=x.dtype, device=x.device)
    grad_expanded, grad_hidden = torch.empty_like(gate), torch.empty_like(hidden)
    kernel[(triton.cdiv(samples, blocks["BLOCK_N"]),)](
        grad_x,
        grad_residual,
        grad_expanded,
        grad_hidden,
        grad_y,
        x if grad_skip is None else grad_skip,  # Some pointer, which is not read; likewise for y.
        x,
        x if y is None else y,
        hidden,
        gate,
        reduce_weight,
        expand_weight,
        samples,
        pixels,
        channels,
        reduced,
        HAS_SKIP=grad_skip is not None,
        RELU=y is not None,
        MASKS_RESIDUAL=masks_residual,
        **blocks,
    )
    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    gradients = [torch.empty(shape, dtype=reduce_weight.dtype, device=x.device) for shape in shapes]
    grid = triton.cdiv(reduced, WEIGHT_GRADIENT["BLOCK_R"]), triton.cdiv(channels, WEIGHT_GRADIENT["BLOCK_C"])
    of_weights[grid](
        *gradients, pooled, hidden, grad_hidden, grad_expanded, samples, channels, reduced, **WEIGHT_GRADIENT
    )
    return grad_x, grad_residual, *gradients


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
    """`squeeze_excite` together with what its gradient needs: y, and in float32 pooled (N, C), hidden (N, R) and
    gate (N, C).
    """
    arguments = x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu
    _check(*arguments[:-1])
    if fits(x, reduce_weight) and use_triton(x):
        return launch_squeeze_excite(wrap_triton(squeeze_excite_kernel), *arguments)
    return _forward_reference(*arguments)


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
    """The gradients of x, residual, reduce_weight, reduce_bias, expand_weight and expand_bias.

    With p a pixel of P, c a channel, u a hidden unit, and sums over what the left side lacks (the sample n only in
    weights and biases):

        pooled_c = sum x_pc / P                                     grad_pc = grad_y_pc + grad_skip_pc where the ReLU
        let y pass, else 0 hidden_u = relu(sum reduce_weight_uc pooled_c + bias)       grad_residual_pc = grad_pc gate_c
        = sigmoid(sum expand_weight_cu hidden_u + bias)      grad_expanded_c = gate_c (1 - gate_c) sum grad_pc x_pc y_pc
        = relu(x_pc gate_c + residual_pc)                      grad_hidden_u = [hidden_u > 0] sum expand_weight_cu
        grad_expanded_c
                                                                    grad_pooled_c = sum reduce_weight_uc grad_hidden_u
                                                                    grad_x_pc = grad_pc gate_c + grad_pooled_c / P
        grad_reduce_weight_uc = sum grad_hidden_nu pooled_nc        its bias: sum grad_hidden_nu
        grad_expand_weight_cu = sum grad_expanded_nc hidden_nu      its bias: sum grad_expanded_nc

    Args:
        grad_y: (N, C, H, W), of the dtype of x, of any strides.
        grad_skip: like grad_y, that of the result given to a shortcut, which is added to grad_y; None where there is
        none. x: (N, C, H, W), as given to `squeeze_excite`. y: what it returned; None where there was no ReLU. pooled:
        (N, C) float32, as are hidden: (N, R) and gate: (N, C). reduce_weight: (R, C), of the dtype that the gradients
        of weights and biases get. expand_weight: (C, R). masks_residual: whether a gradient of the residual is wanted
        that is not simply grad_y; else it comes empty.
    """
    arguments = grad_y, grad_skip, x, y, pooled, hidden, gate, reduce_weight, expand_weight, masks_residual
    if fits(x, reduce_weight) and use_triton(x):
        return launch_squeeze_excite_backward(
            wrap_triton(gradient_kernel), wrap_triton(weight_gradient_kernel), *arguments
        )
    return _backward_reference(*arguments)


class SqueezeExcite(torch.autograd.Function):
    """Joins the two ops; `torch.library` lets no op return a tensor twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        reduce_weight: Tensor,
        reduce_bias: Tensor,
        expand_weight: Tensor,
        expand_bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        skip: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, *intermediates = squeeze_excite_forward(
            x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu
        )
        ctx.save_for_backward(x, y if relu else None, *intermediates, reduce_weight, expand_weight)
        ctx.has_residual, ctx.masks_residual = residual is not None, residual is not None and (relu or skip)
        # The same tensor would be one to autograd, which would add up both gradients itself.
        return (y, y.view_as(y)) if skip else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_skip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        grad_x, grad_residual, *of_weights = squeeze_excite_backward(
            grad_y, grad_skip, *ctx.saved_tensors, ctx.masks_residual
        )
        if not ctx.masks_residual:
            grad_residual = grad_y if ctx.has_residual else None
        return grad_x, *of_weights, grad_residual, None, None


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
    """Scales each channel by sigmoid(expand_weight relu(reduce_weight means + reduce_bias) + expand_bias), then adds
    and activates.

    Computed in float32, under autocast too, and rounded once; the weights are not cast. Deterministic. Differentiable,
    once, in all tensors.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        reduce_weight: (R, C), contiguous, float32 or of the dtype of x; those of a 1x1 convolution, without their last
        two dimensions. reduce_bias: (R,), contiguous, of the dtype of reduce_weight, as are expand_weight: (C, R),
        contiguous, and expand_bias: (C,), contiguous. residual: like x; added after the scaling. relu: whether a ReLU
        comes last. skip: whether to return the result once more, for a shortcut, whose gradient the backward pass then
        adds by itself.

    Returns:
        y: like x, twice with `skip`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device.
    """
    return SqueezeExcite.apply(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu, skip)


def _check(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, not {x.dtype}.")
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"x must be channels_last (N, C, H, W), not of shape {tuple(x.shape)} with strides {x.stride()}."
        )
    dtype = reduce_weight.dtype
    if dtype not in (torch.float32, x.dtype):
        raise TypeError(f"reduce_weight must be float32 or, like x, {x.dtype}, not {dtype}.")
    channels = x.shape[1]
    if reduce_weight.dim() != 2 or 0 in reduce_weight.shape:
        raise ValueError(f"reduce_weight must be (R, {channels}), not of shape {tuple(reduce_weight.shape)}.")
    reduced = reduce_weight.shape[0]
    expected = (
        ("reduce_weight", reduce_weight, (reduced, channels)),
        ("reduce_bias", reduce_bias, (reduced,)),
        ("expand_weight", expand_weight, (channels, reduced)),
        ("expand_bias", expand_bias, (channels,)),
    )
    for name, tensor, shape in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like reduce_weight, not {tensor.dtype}.")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous of shape {shape}, not {tuple(tensor.shape)} with strides {tensor.stride()}."
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, not on {tensor.device}.")
    if residual is not None:
        _check_residual(residual, x)


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, not {residual.dtype}.")
    if residual.shape != x.shape or not residual.is_contiguous(memory_format=torch.channels_last):
        shape = tuple(x.shape)
        raise ValueError(
            f"residual must be channels_last {shape}, not of shape {tuple(residual.shape)} with strides "
            f"{residual.stride()}."
        )
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, not on {residual.device}.")


NETWORK_SHAPES = ((256, 8), (512, 4), (1024, 2), (2048, 1))
"""Channels and side of the stages of residual networks, from images of 32 by 32."""


ACTIVATIONS = ("x_ptr", "y_ptr", "residual_ptr", "grad_x_ptr", "grad_y_ptr", "grad_skip_ptr", "grad_residual_ptr")


def _compilation(kernel: Any, dtype: str, constexprs: Mapping[str, int], num_warps: int = 4) -> Compilation:
    """A launch of `kernel` with all that it can do, for activations of `dtype` and, as in the networks, weights in
    float32.
    """
    types = {
        "pixels": "i32",
        **dict.fromkeys(("samples", "channels", "reduced"), "i32:16"),
        **dict.fromkeys(ACTIVATIONS, f"*{dtype}:16"),
    }
    names = [name for name in inspect.signature(getattr(kernel, "fn", kernel)).parameters if name.islower()]
    return Compilation(kernel, {name: types.get(name, "*fp32:16") for name in names}, constexprs, num_warps)


def _compilations(dtype: str, channels: int, side: int) -> list[Compilation]:
    """The launches that depend on the shape of the activation."""
    blocks = _blocks(side * side, channels, channels // 16)
    num_warps = blocks.pop("num_warps")
    launches = (
        (squeeze_excite_kernel, {"HAS_RESIDUAL": True}),
        (gradient_kernel, {"HAS_SKIP": True, "MASKS_RESIDUAL": True}),
    )
    return [_compilation(kernel, dtype, {"RELU": True, **flags, **blocks}, num_warps) for kernel, flags in launches]


COMPILATIONS = [
    *(
        compilation
        for dtype in ("fp32", "bf16")
        for shape in NETWORK_SHAPES
        for compilation in _compilations(dtype, *shape)
    ),
    _compilation(weight_gradient_kernel, "fp32", WEIGHT_GRADIENT),
]


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Arguments for N, C, H, W, R, residual and relu; weights in float32, of a size that saturates no gate."""
    channels, reduced, size = shape["C"], shape["R"], (shape["N"], shape["C"], shape["H"], shape["W"])

    def activation() -> Tensor:
        return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    return {
        "x": activation(),
        "reduce_weight": torch.randn(reduced, channels, device=device) / channels**0.5,
        "reduce_bias": torch.randn(reduced, device=device) / 2,
        "expand_weight": torch.randn(channels, reduced, device=device) / reduced**0.5,
        "expand_bias": torch.randn(channels, device=device) / 2,
        "residual": activation() if shape["residual"] else None,
        "relu": shape["relu"],
        "skip": shape["skip"],
    }


def plain(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    skip: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Squeeze-and-excitation as it is usually written, all in the dtype of x."""
    weights = (
        tensor.to(x.dtype)
        for tensor in (reduce_weight[:, :, None, None], reduce_bias, expand_weight[:, :, None, None], expand_bias)
    )
    reduce_weight, reduce_bias, expand_weight, expand_bias = weights
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), reduce_weight, reduce_bias))
    y = x * F.conv2d(hidden, expand_weight, expand_bias).sigmoid()
    if residual is not None:
        y = y + residual
    y = F.relu(y) if relu else y
    return (y, y) if skip else y


def launch(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    skip: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`squeeze_excite` through its kernel itself."""
    y = launch_squeeze_excite(
        squeeze_excite_kernel, x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu
    )[0]
    return (y, y) if skip else y


def _case(
    sizes: tuple[int, int, int, int, int], residual: bool, relu: bool, skip: bool = False, of_a_network: bool = False
) -> Case:
    name = "x".join(map(str, sizes)) + "-residual" * residual + "-relu" * relu + "-skip" * skip
    return Case(
        name, {**dict(zip("NCHWR", sizes, strict=True)), "residual": residual, "relu": relu, "skip": skip}, of_a_network
    )


SPEC = OpSpec(
    op=squeeze_excite,
    reference=squeeze_excite_reference,
    launch=launch,
    make=make,
    exact=plain,
    rival=plain,
    cases=(
        _case((1, 1, 1, 1, 1), False, False),
        _case((3, 3, 5, 7, 2), True, True),
        _case((3, 17, 8, 8, 5), False, True),
        _case((17, 300, 3, 2, 30), True, True, skip=True),
        _case((3, 17, 5, 7, 3), True, False, skip=True),
        # Too large for the kernels.
        _case((1, 130, 13, 17, 37), True, False, skip=True),
        *(
            _case((128, channels, side, side, channels // 16), True, True, of_a_network=True)
            for channels, side in NETWORK_SHAPES
        ),
        _case((128, 256, 8, 8, 16), True, True, skip=True, of_a_network=True),
    ),
    bytes_moved=lambda given: (
        sum(tensor.nbytes for tensor in given.values() if isinstance(tensor, Tensor)) + given["x"].nbytes
    ),
    summary="Squeeze-and-excitation, with the addition of a residual and ReLU where they follow.",
    ops=("fastcifar::squeeze_excite", "fastcifar::squeeze_excite_backward"),
    differentiable=("x", "residual", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
    # The gradients of weights and biases sum few values here, after a dozen roundings each: over random seeds they are
    # no further off than PyTorch's in the median, but in one of twenty cases 2.5 times as far, where it is lucky.
    multiple={torch.float32: 4.0},
)
