"""Squeeze-and-excitation: every channel scaled by a gate that a small network computes from the means of all channels.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507. Activations are NHWC. Where the addition of a residual and
the ReLU follow, they ride along.

A sample of at most `FUSED_TILE` values, with weights of at most `FUSED_WEIGHT` each, takes one launch: its program holds it in registers
between pooling and scaling, and computes the gates itself. Any other takes four: pool, two dense layers, scale; it is read a second
time, from the L2 where the batch fits there. The backward pass takes two and five, the last of them for the gradients of the weights.
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

# Sixteen warps hold 32 values of each tensor a thread: twice as many and the two tensors of the backward pass spill.
FUSED_TILE = 16384

# Each sample's program reads both weights through the L2, 256 KB in float32: about 3 us at an SM's share of it (computed, not timed).
# Beyond, the dense layers of sixteen samples at a time cost less, their launches included.
FUSED_WEIGHT = 32768

# Weights are read in tiles of so many values. Chosen by the registers left beside an activation.
WEIGHT_TILE = 4096

# Eight warps hold 32 values of each tensor a thread, in rows of at least 64 channels: 128 bytes of a half precision. Chosen by the
# registers, not by timing.
TILE = 8192
TILE_WARPS = 8

# Tiles of the dense layers and of the gradients of their weights: small, since their matrices are.
DENSE = {"BLOCK_N": 16, "BLOCK_J": 32, "BLOCK_K": 32}
WEIGHT_GRADIENT = {"BLOCK_N": 32, "BLOCK_R": 16, "BLOCK_C": 32}


def squeeze_excite_reference(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """What `squeeze_excite` computes, in plain torch: in float32, rounded once."""
    return _forward_reference(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)[0]


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
    grad = grad_y if y is None else grad_y.masked_fill(y <= 0, 0)
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
def fused_kernel(
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
    pixels,
    channels,
    reduced,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    pixel, channel = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    inside = (pixel < pixels) & is_channel[None, :]
    offsets = sample * pixels * channels + pixel * channels + channel[None, :]
    x = tl.load(x_ptr + offsets, inside, 0).to(tl.float32)
    pooled = tl.sum(x, 0) / pixels
    tl.store(pooled_ptr + sample * channels + channel, pooled, is_channel)

    # A block of hidden units is complete at once, since a program holds all channels, and adds its share to all gates.
    expanded = tl.load(expand_bias_ptr + channel, is_channel, 0).to(tl.float32)
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        is_weight = (unit < reduced)[:, None] & is_channel[None, :]
        weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0).to(tl.float32)
        hidden = tl.sum(weight * pooled[None, :], 1) + tl.load(reduce_bias_ptr + unit, unit < reduced, 0).to(tl.float32)
        hidden = tl.where(hidden < 0, 0.0, hidden)
        tl.store(hidden_ptr + sample * reduced + unit, hidden, unit < reduced)
        weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0).to(tl.float32)
        expanded += tl.sum(weight * hidden[:, None], 0)
    gate = tl.sigmoid(expanded)
    tl.store(gate_ptr + sample * channels + channel, gate, is_channel)

    y = x * gate[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, inside, 0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), inside)


@jit
def pool_kernel(pooled_ptr, x_ptr, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mean of each channel over a sample's pixels."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        offsets = sample * pixels * channels + pixel * channels + channel[None, :]
        total += tl.load(x_ptr + offsets, (pixel < pixels) & is_channel[None, :], 0).to(tl.float32)
    tl.store(pooled_ptr + sample * channels + channel, tl.sum(total, 0) / pixels, is_channel)


@jit
def product(
    left_ptr,
    right_ptr,
    row,
    column,
    rows,
    columns,
    inner,
    row_stride,
    column_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the product of float32 (rows, inner), contiguous, and (inner, columns), whose strides are given, in float32."""
    total = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(left_ptr + row[:, None] * inner + k[None, :], (row < rows)[:, None] & (k < inner)[None, :], 0)
        right_mask = (k < inner)[:, None] & (column < columns)[None, :]
        right = tl.load(right_ptr + k[:, None] * row_stride + column[None, :] * column_stride, right_mask, 0).to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@jit
def dense_kernel(
    output_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    samples,
    features,
    outputs,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A dense layer and its ReLU, or else its sigmoid: (samples, features) -> (samples, outputs), with a weight (outputs, features)."""
    sample = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    bias = tl.load(bias_ptr + output, output < outputs, 0).to(tl.float32)
    total = product(input_ptr, weight_ptr, sample, output, samples, outputs, features, 1, features, BLOCK_N, BLOCK_J, BLOCK_K)
    total += bias[None, :]
    total = tl.where(total < 0, 0.0, total) if RELU else tl.sigmoid(total)
    is_output = (sample < samples)[:, None] & (output < outputs)[None, :]
    tl.store(output_ptr + sample[:, None] * outputs + output[None, :], total, is_output)


@jit
def scale_kernel(
    y_ptr,
    x_ptr,
    gate_ptr,
    residual_ptr,
    pixels,
    channels,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The samples pooled last are the likeliest to be in the L2 still.
    sample = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (pixel < pixels) & (channel < channels)[None, :]
    offsets = sample * pixels * channels + pixel * channels + channel[None, :]
    gate = tl.load(gate_ptr + sample * channels + channel, channel < channels, 0)
    y = tl.load(x_ptr + offsets, inside, 0).to(tl.float32) * gate[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, inside, 0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), inside)


@jit
def masked_gradient(grad_y_ptr, y_ptr, offsets, inside, RELU: tl.constexpr):
    """The gradient before the ReLU, as float32; a nan in the output lets it pass, as in torch."""
    grad = tl.load(grad_y_ptr + offsets, inside, 0).to(tl.float32)
    if RELU:
        grad = tl.where(tl.load(y_ptr + offsets, inside, 0).to(tl.float32) <= 0, 0.0, grad)
    return grad


@jit
def fused_gradient_kernel(
    grad_x_ptr,
    grad_residual_ptr,
    grad_expanded_ptr,
    grad_hidden_ptr,
    grad_y_ptr,
    x_ptr,
    y_ptr,
    hidden_ptr,
    gate_ptr,
    reduce_weight_ptr,
    expand_weight_ptr,
    pixels,
    channels,
    reduced,
    RELU: tl.constexpr,
    MASKS_RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    pixel, channel = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    inside = (pixel < pixels) & is_channel[None, :]
    offsets = sample * pixels * channels + pixel * channels + channel[None, :]
    grad = masked_gradient(grad_y_ptr, y_ptr, offsets, inside, RELU)
    if MASKS_RESIDUAL:
        tl.store(grad_residual_ptr + offsets, grad.to(grad_residual_ptr.dtype.element_ty), inside)
    x = tl.load(x_ptr + offsets, inside, 0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * channels + channel, is_channel, 0)
    grad_expanded = tl.sum(grad * x, 0) * gate * (1 - gate)
    tl.store(grad_expanded_ptr + sample * channels + channel, grad_expanded, is_channel)

    grad_pooled = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        is_weight = (unit < reduced)[:, None] & is_channel[None, :]
        weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0).to(tl.float32)
        hidden = tl.load(hidden_ptr + sample * reduced + unit, unit < reduced, 0)
        grad_hidden = tl.where(hidden <= 0, 0.0, tl.sum(weight * grad_expanded[None, :], 1))
        tl.store(grad_hidden_ptr + sample * reduced + unit, grad_hidden, unit < reduced)
        weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0).to(tl.float32)
        grad_pooled += tl.sum(weight * grad_hidden[:, None], 0)

    grad_x = grad * gate[None, :] + (grad_pooled / pixels)[None, :]
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), inside)


@jit
def expanded_gradient_kernel(
    grad_expanded_ptr,
    grad_y_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    pixels,
    channels,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of what the gates' sigmoid was given."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (pixel < pixels) & is_channel[None, :]
        offsets = sample * pixels * channels + pixel * channels + channel[None, :]
        grad = masked_gradient(grad_y_ptr, y_ptr, offsets, inside, RELU)
        total += grad * tl.load(x_ptr + offsets, inside, 0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * channels + channel, is_channel, 0)
    tl.store(grad_expanded_ptr + sample * channels + channel, tl.sum(total, 0) * gate * (1 - gate), is_channel)


@jit
def dense_gradient_kernel(
    grad_input_ptr,
    grad_output_ptr,
    weight_ptr,
    activated_ptr,
    samples,
    outputs,
    features,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of a dense layer's input: (samples, outputs) -> (samples, features); with RELU, of what the ReLU before it was given."""
    sample = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    offsets = sample[:, None] * features + feature[None, :]
    is_feature = (sample < samples)[:, None] & (feature < features)[None, :]
    total = product(grad_output_ptr, weight_ptr, sample, feature, samples, features, outputs, features, 1, BLOCK_N, BLOCK_J, BLOCK_K)
    if RELU:
        total = tl.where(tl.load(activated_ptr + offsets, is_feature, 0) <= 0, 0.0, total)
    tl.store(grad_input_ptr + offsets, total, is_feature)


@jit
def input_gradient_kernel(
    grad_x_ptr,
    grad_residual_ptr,
    grad_y_ptr,
    y_ptr,
    gate_ptr,
    grad_pooled_ptr,
    pixels,
    channels,
    RELU: tl.constexpr,
    MASKS_RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # As in the forward pass, from the sample read last.
    sample = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (pixel < pixels) & (channel < channels)[None, :]
    offsets = sample * pixels * channels + pixel * channels + channel[None, :]
    grad = masked_gradient(grad_y_ptr, y_ptr, offsets, inside, RELU)
    if MASKS_RESIDUAL:
        tl.store(grad_residual_ptr + offsets, grad.to(grad_residual_ptr.dtype.element_ty), inside)
    gate = tl.load(gate_ptr + sample * channels + channel, channel < channels, 0)
    grad_pooled = tl.load(grad_pooled_ptr + sample * channels + channel, channel < channels, 0)
    grad_x = grad * gate[None, :] + (grad_pooled / pixels)[None, :]
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), inside)


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
    """Sums the gradients of both weights and biases over the batch, one program for a tile of (R, C): no atomics, one order of summation.

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
    tl.store(grad_reduce_weight_ptr + unit[:, None] * channels + channel[None, :], of_reduce_weight.to(dtype), is_weight)
    tl.store(grad_expand_weight_ptr + channel[None, :] * reduced + unit[:, None], of_expand_weight.to(dtype), is_weight)
    if tl.program_id(1) == 0:
        tl.store(grad_reduce_bias_ptr + unit, of_reduce_bias.to(dtype), unit < reduced)
    if tl.program_id(0) == 0:
        tl.store(grad_expand_bias_ptr + channel, of_expand_bias.to(dtype), channel < channels)


FORWARD_KERNELS = fused_kernel, pool_kernel, dense_kernel, scale_kernel
BACKWARD_KERNELS = fused_gradient_kernel, expanded_gradient_kernel, dense_gradient_kernel, input_gradient_kernel, weight_gradient_kernel


def _power_of_2(length: int) -> int:
    """The smallest that is not below `length`."""
    return 1 << (length - 1).bit_length()


def _is_fused(pixels: int, channels: int, reduced: int) -> bool:
    """Whether a program holds a whole sample and reads all weights."""
    return _power_of_2(pixels) * _power_of_2(channels) <= FUSED_TILE and channels * reduced <= FUSED_WEIGHT


def _fused_blocks(pixels: int, channels: int, reduced: int) -> dict[str, int]:
    """The constexprs and warps of the fused kernels."""
    blocks = {"BLOCK_P": _power_of_2(pixels), "BLOCK_C": _power_of_2(channels)}
    units = max(1, min(_power_of_2(reduced), WEIGHT_TILE // blocks["BLOCK_C"]))
    return {**blocks, "BLOCK_R": units, "num_warps": max(TILE_WARPS, blocks["BLOCK_P"] * blocks["BLOCK_C"] // 1024)}


def _blocks(pixels: int, channels: int) -> dict[str, int]:
    """The constexprs and warps of the kernels that see a part of a sample."""
    block_p = min(_power_of_2(pixels), TILE // 64)
    return {"BLOCK_P": block_p, "BLOCK_C": min(_power_of_2(channels), TILE // block_p), "num_warps": TILE_WARPS}


def _launch_dense(kernel: Any, output: Tensor, input: Tensor, weight: Tensor, other: Tensor, relu: bool) -> None:
    """Launches `dense_kernel` or `dense_gradient_kernel`; `other` is the bias of the one, the ReLU's result of the other."""
    (samples, width), inner = output.shape, input.shape[1]
    grid = triton.cdiv(samples, DENSE["BLOCK_N"]), triton.cdiv(width, DENSE["BLOCK_J"])
    kernel[grid](output, input, weight, other, samples, inner, width, RELU=relu, **DENSE)


@launcher
def launch_squeeze_excite(
    kernels: tuple[Any, Any, Any, Any],
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `kernels`, which are `FORWARD_KERNELS` or their wrapped forms, over new outputs."""
    fused, pool, dense, scale = kernels
    # Sizes are compiled into the kernels' blocks, so that they are numbers even where a graph is traced for all sizes.
    samples, channels, pixels = len(x), int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    reduced = int(reduce_weight.shape[0])
    y = torch.empty_like(x)
    pooled, gate = (torch.empty((samples, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    hidden = torch.empty((samples, reduced), dtype=torch.float32, device=x.device)
    # An absent residual needs some pointer, which is not read.
    after = {"residual_ptr": x if residual is None else residual, "HAS_RESIDUAL": residual is not None, "RELU": relu}
    if _is_fused(pixels, channels, reduced):
        sizes = {"pixels": pixels, "channels": channels, "reduced": reduced, **_fused_blocks(pixels, channels, reduced)}
        weights = reduce_weight, reduce_bias, expand_weight, expand_bias
        fused[(samples,)](y, pooled, hidden, gate, x, *weights, **after, **sizes)
        return y, pooled, hidden, gate
    blocks = _blocks(pixels, channels)
    tiles = triton.cdiv(pixels, blocks["BLOCK_P"]), triton.cdiv(channels, blocks["BLOCK_C"])
    pool[(samples, tiles[1])](pooled, x, pixels, channels, **blocks)
    _launch_dense(dense, hidden, pooled, reduce_weight, reduce_bias, relu=True)
    _launch_dense(dense, gate, hidden, expand_weight, expand_bias, relu=False)
    scale[(samples, *tiles)](y, x, gate, pixels=pixels, channels=channels, **after, **blocks)
    return y, pooled, hidden, gate


@launcher
def launch_squeeze_excite_backward(
    kernels: tuple[Any, Any, Any, Any, Any],
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    masks_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches `kernels`, which are `BACKWARD_KERNELS` or their wrapped forms, over new outputs."""
    fused, of_expanded, dense, of_input, of_weights = kernels
    samples, channels, pixels = len(x), int(x.shape[1]), int(x.shape[2]) * int(x.shape[3])
    reduced = int(reduce_weight.shape[0])
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if masks_residual else torch.empty(0, dtype=x.dtype, device=x.device)
    grad_expanded, grad_hidden = torch.empty_like(gate), torch.empty_like(hidden)
    # Without a ReLU its output needs some pointer, which is not read.
    flags = {"y_ptr": x if y is None else y, "RELU": y is not None}
    if _is_fused(pixels, channels, reduced):
        sizes = {"pixels": pixels, "channels": channels, "reduced": reduced, **_fused_blocks(pixels, channels, reduced)}
        read = {"hidden_ptr": hidden, "gate_ptr": gate, "reduce_weight_ptr": reduce_weight, "expand_weight_ptr": expand_weight}
        written = grad_x, grad_residual, grad_expanded, grad_hidden
        fused[(samples,)](*written, grad_y, x, **flags, **read, MASKS_RESIDUAL=masks_residual, **sizes)
    else:
        blocks = _blocks(pixels, channels)
        tiles = triton.cdiv(pixels, blocks["BLOCK_P"]), triton.cdiv(channels, blocks["BLOCK_C"])
        sizes = {"pixels": pixels, "channels": channels, **blocks}
        of_expanded[(samples, tiles[1])](grad_expanded, grad_y, x, gate_ptr=gate, **flags, **sizes)
        grad_pooled = torch.empty_like(pooled)
        _launch_dense(dense, grad_hidden, grad_expanded, expand_weight, hidden, relu=True)
        _launch_dense(dense, grad_pooled, grad_hidden, reduce_weight, pooled, relu=False)
        means = {"gate_ptr": gate, "grad_pooled_ptr": grad_pooled}
        of_input[(samples, *tiles)](grad_x, grad_residual, grad_y, **flags, **means, MASKS_RESIDUAL=masks_residual, **sizes)
    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    gradients = [torch.empty(shape, dtype=reduce_weight.dtype, device=x.device) for shape in shapes]
    grid = triton.cdiv(reduced, WEIGHT_GRADIENT["BLOCK_R"]), triton.cdiv(channels, WEIGHT_GRADIENT["BLOCK_C"])
    of_weights[grid](*gradients, pooled, hidden, grad_hidden, grad_expanded, samples, channels, reduced, **WEIGHT_GRADIENT)
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
    """`squeeze_excite` together with what its gradient needs: y, and in float32 pooled (N, C), hidden (N, R) and gate (N, C)."""
    arguments = x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu
    _check(*arguments[:-1])
    if use_triton(x):
        kernels = wrap_triton(fused_kernel), wrap_triton(pool_kernel), wrap_triton(dense_kernel), wrap_triton(scale_kernel)
        return launch_squeeze_excite(kernels, *arguments)
    return _forward_reference(*arguments)


@triton_op("fastcifar::squeeze_excite_backward", mutates_args=())
def squeeze_excite_backward(
    grad_y: Tensor,
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

    With p a pixel of P, c a channel, u a hidden unit, and sums over what the left side lacks (the sample n only in weights and biases):

        pooled_c = sum x_pc / P                                     grad_pc = grad_y_pc, where the ReLU let y pass, else 0
        hidden_u = relu(sum reduce_weight_uc pooled_c + bias)       grad_residual_pc = grad_pc
        gate_c = sigmoid(sum expand_weight_cu hidden_u + bias)      grad_expanded_c = gate_c (1 - gate_c) sum grad_pc x_pc
        y_pc = relu(x_pc gate_c + residual_pc)                      grad_hidden_u = [hidden_u > 0] sum expand_weight_cu grad_expanded_c
                                                                    grad_pooled_c = sum reduce_weight_uc grad_hidden_u
                                                                    grad_x_pc = grad_pc gate_c + grad_pooled_c / P
        grad_reduce_weight_uc = sum grad_hidden_nu pooled_nc        its bias: sum grad_hidden_nu
        grad_expand_weight_cu = sum grad_expanded_nc hidden_nu      its bias: sum grad_expanded_nc

    Args:
        grad_y: (N, C, H, W), of the dtype and strides of x.
        x: (N, C, H, W), as given to `squeeze_excite`.
        y: what it returned; None where there was no ReLU.
        pooled: (N, C) float32, as are
        hidden: (N, R) and
        gate: (N, C).
        reduce_weight: (R, C), of the dtype that the gradients of weights and biases get.
        expand_weight: (C, R).
        masks_residual: whether a gradient of the residual is wanted that is not simply grad_y; else it comes empty.
    """
    arguments = grad_y, x, y, pooled, hidden, gate, reduce_weight, expand_weight, masks_residual
    if use_triton(x):
        whole = wrap_triton(fused_gradient_kernel)
        in_parts = wrap_triton(expanded_gradient_kernel), wrap_triton(dense_gradient_kernel), wrap_triton(input_gradient_kernel)
        return launch_squeeze_excite_backward((whole, *in_parts, wrap_triton(weight_gradient_kernel)), *arguments)
    return _backward_reference(*arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, reduce_weight, _, expand_weight, _, residual, relu = inputs
    y, *intermediates = output
    ctx.mark_non_differentiable(*intermediates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y if relu else None, *intermediates, reduce_weight, expand_weight)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    masks_residual = ctx.has_residual and saved[1] is not None
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    grad_x, grad_residual, *of_weights = squeeze_excite_backward(grad_y, *saved, masks_residual)
    if not masks_residual:
        grad_residual = grad_y if ctx.has_residual else None
    return grad_x, *of_weights, grad_residual, None


squeeze_excite_forward.register_autograd(_backward, setup_context=_save)


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Scales each channel by sigmoid(expand_weight relu(reduce_weight means + reduce_bias) + expand_bias), then adds and activates.

    Computed in float32, under autocast too, and rounded once; the weights are not cast. Deterministic. Differentiable, once, in all
    tensors.

    Args:
        x: (N, C, H, W), channels_last, float32, float16 or bfloat16.
        reduce_weight: (R, C), contiguous, float32 or of the dtype of x; those of a 1x1 convolution, without their last two dimensions.
        reduce_bias: (R,), contiguous, of the dtype of reduce_weight, as are
        expand_weight: (C, R), contiguous, and
        expand_bias: (C,), contiguous.
        residual: like x; added after the scaling.
        relu: whether a ReLU comes last.

    Returns:
        y: like x.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device.
    """
    return squeeze_excite_forward(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)[0]


def _check(
    x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor, residual: Tensor | None
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, not {x.dtype}.")
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be channels_last (N, C, H, W), not of shape {tuple(x.shape)} with strides {x.stride()}.")
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
            raise ValueError(f"{name} must be contiguous of shape {shape}, not {tuple(tensor.shape)} with strides {tensor.stride()}.")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, not on {tensor.device}.")
    if residual is not None:
        _check_residual(residual, x)


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, not {residual.dtype}.")
    if residual.shape != x.shape or not residual.is_contiguous(memory_format=torch.channels_last):
        shape = tuple(x.shape)
        raise ValueError(f"residual must be channels_last {shape}, not of shape {tuple(residual.shape)} with strides {residual.stride()}.")
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, not on {residual.device}.")


NETWORK_SHAPES = ((256, 8), (512, 4), (1024, 2), (2048, 1), (256, 32), (512, 16))
"""Channels and side of the stages of residual networks, from images of 32 by 32, and of 128 by 128."""


SIZES = ("samples", "pixels", "channels", "reduced", "features", "outputs")
IN_FLOAT32 = (
    "pooled",
    "hidden",
    "gate",
    "input",
    "output",
    "activated",
    "grad_expanded",
    "grad_hidden",
    "grad_pooled",
    "grad_input",
    "grad_output",
)


def _compilation(kernel: Any, dtype: str, constexprs: Mapping[str, int], num_warps: int = 4) -> Compilation:
    """A launch of `kernel` with all that it can do, for activations and weights of `dtype`."""
    signature = {}
    for name in inspect.signature(getattr(kernel, "fn", kernel)).parameters:
        if name in SIZES:
            signature[name] = "i32" if name == "pixels" else "i32:16"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32:16" if name.removesuffix("_ptr") in IN_FLOAT32 else f"*{dtype}:16"
    return Compilation(kernel, signature, constexprs, num_warps)


def _compilations(dtype: str, channels: int, side: int) -> list[Compilation]:
    """The launches that depend on the shape of the activation."""
    pixels, reduced, relu = side * side, channels // 16, {"RELU": True}
    forward, backward = {**relu, "HAS_RESIDUAL": True}, {**relu, "MASKS_RESIDUAL": True}
    if _is_fused(pixels, channels, reduced):
        blocks = _fused_blocks(pixels, channels, reduced)
        launches = (fused_kernel, forward), (fused_gradient_kernel, backward)
    else:
        blocks = _blocks(pixels, channels)
        launches = (pool_kernel, {}), (scale_kernel, forward), (expanded_gradient_kernel, relu), (input_gradient_kernel, backward)
    num_warps = blocks.pop("num_warps")
    return [_compilation(kernel, dtype, {**flags, **blocks}, num_warps) for kernel, flags in launches]


COMPILATIONS = [
    # Both stages at 128 by 128 have the same blocks.
    *(compilation for shape in NETWORK_SHAPES[:-1] for compilation in _compilations("fp32", *shape)),
    *(compilation for shape in NETWORK_SHAPES[1::4] for compilation in _compilations("bf16", *shape)),
    *(_compilation(dense_kernel, "bf16", {"RELU": relu, **DENSE}) for relu in (True, False)),
    *(_compilation(dense_gradient_kernel, dtype, {"RELU": True, **DENSE}) for dtype in ("fp32", "bf16")),
    *(_compilation(weight_gradient_kernel, dtype, WEIGHT_GRADIENT) for dtype in ("fp32", "bf16")),
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
    }


def plain(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Squeeze-and-excitation as it is usually written, all in the dtype of x."""
    weights = (
        tensor.to(x.dtype) for tensor in (reduce_weight[:, :, None, None], reduce_bias, expand_weight[:, :, None, None], expand_bias)
    )
    reduce_weight, reduce_bias, expand_weight, expand_bias = weights
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), reduce_weight, reduce_bias))
    y = x * F.conv2d(hidden, expand_weight, expand_bias).sigmoid()
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def launch(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`squeeze_excite` through the kernels themselves."""
    return launch_squeeze_excite(FORWARD_KERNELS, x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)[0]


def _case(sizes: tuple[int, int, int, int, int], residual: bool, relu: bool, of_a_network: bool = False) -> Case:
    name = "x".join(map(str, sizes)) + "-residual" * residual + "-relu" * relu
    return Case(name, {**dict(zip("NCHWR", sizes, strict=True)), "residual": residual, "relu": relu}, of_a_network)


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
        _case((1, 130, 13, 17, 37), True, False),
        _case((17, 300, 3, 2, 110), True, True),
        *(_case((128, channels, side, side, channels // 16), True, True, True) for channels, side in NETWORK_SHAPES),
    ),
    bytes_moved=lambda given: sum(tensor.nbytes for tensor in given.values() if isinstance(tensor, Tensor)) + given["x"].nbytes,
    summary="Squeeze-and-excitation, with the addition of a residual and ReLU where they follow.",
    ops=("fastcifar::squeeze_excite", "fastcifar::squeeze_excite_backward"),
    differentiable=("x", "residual", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
    # The gradients of weights and biases sum few values here, after a dozen roundings each: over random seeds they are no further off than
    # PyTorch's in the median, but in one of twenty cases 2.5 times as far, where it is lucky.
    multiple={torch.float32: 4.0},
)
