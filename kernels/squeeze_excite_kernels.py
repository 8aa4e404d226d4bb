"""The Triton kernels of `squeeze_excite`, and what a program holds."""

from __future__ import annotations

from torch import Tensor

from .dispatch import jit, tl, triton

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


@jit
def places_kernel(samples, pixels, channels, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gives a program's first sample, int64, its samples from there and its channels.

    Then come the offsets of its means, (BLOCK_N, BLOCK_C), and of its values, (BLOCK_N, BLOCK_P, BLOCK_C), each with
    which of them exist.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    sample, pixel, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    means = sample[:, None] * channels + channel[None, :]
    is_mean = (sample < samples - first)[:, None] & (channel < channels)[None, :]
    values = (sample[:, None, None] * pixels + pixel[None, :, None]) * channels + channel[None, None, :]
    return first, sample, channel, means, is_mean, values, is_mean[:, None, :] & (pixel < pixels)[None, :, None]


@jit
def load_weights_kernel(reduce_weight_ptr, expand_weight_ptr, unit, channel, channels, reduced):
    """Loads both weights of a block of hidden units: float32 (BLOCK_R, BLOCK_C) each."""
    inside = (unit < reduced)[:, None] & (channel < channels)[None, :]
    reduce_weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], inside, 0)
    expand_weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], inside, 0)
    return reduce_weight.to(tl.float32), expand_weight.to(tl.float32)


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
    first, sample, channel, means, is_mean, values, is_value = places_kernel(
        samples, pixels, channels, BLOCK_N, BLOCK_P, BLOCK_C
    )
    x = tl.load(x_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    pooled = tl.sum(x, 1) / pixels
    tl.store(pooled_ptr + first * channels + means, pooled, is_mean)

    # A block of hidden units is complete at once, since a program holds all channels, and adds its share to all gates.
    expand_bias = tl.load(expand_bias_ptr + channel, channel < channels, 0).to(tl.float32)
    expanded = tl.zeros((BLOCK_N, BLOCK_C), tl.float32) + expand_bias[None, :]
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        reduce_weight, expand_weight = load_weights_kernel(
            reduce_weight_ptr, expand_weight_ptr, unit, channel, channels, reduced
        )
        bias = tl.load(reduce_bias_ptr + unit, unit < reduced, 0).to(tl.float32)
        hidden = tl.sum(reduce_weight[None, :, :] * pooled[:, None, :], 2) + bias[None, :]
        hidden = tl.where(hidden < 0, 0.0, hidden)
        units = sample[:, None] * reduced + unit[None, :]
        is_hidden = (sample < samples - first)[:, None] & (unit < reduced)[None, :]
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
    first, sample, channel, means, is_mean, values, is_value = places_kernel(
        samples, pixels, channels, BLOCK_N, BLOCK_P, BLOCK_C
    )
    grad = tl.load(grad_y_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    if HAS_SKIP:
        grad += tl.load(grad_skip_ptr + first * pixels * channels + values, is_value, 0).to(tl.float32)
    if RELU:
        # Unlike y > 0, this lets the gradient of a NaN pass, as in torch.
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
        reduce_weight, expand_weight = load_weights_kernel(
            reduce_weight_ptr, expand_weight_ptr, unit, channel, channels, reduced
        )
        units = sample[:, None] * reduced + unit[None, :]
        is_hidden = (sample < samples - first)[:, None] & (unit < reduced)[None, :]
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
    """Sums the gradients of both weights and biases over the batch, one program for a tile of (R, C).

    There are no atomics, so the order of summation is fixed. It is one launch, where matrix products and sums in torch
    would be four, and casts to the dtype of the weights four more.
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
    """Returns whether the kernels take these tensors: a program holds a whole sample, and reads both weights."""
    _, pixels, channels, reduced = sizes_of(x, reduce_weight)
    sample = triton.next_power_of_2(pixels) * triton.next_power_of_2(channels)
    return sample <= LARGEST_SAMPLE and channels * reduced <= LARGEST_WEIGHT


def sizes_of(x: Tensor, reduce_weight: Tensor) -> tuple[int, int, int, int]:
    """Returns the numbers of samples, pixels of a sample, channels and hidden units.

    All but the samples are numbers even where a graph is traced for all sizes, since they are compiled into the
    kernels' blocks.
    """
    return len(x), int(x.shape[2]) * int(x.shape[3]), int(x.shape[1]), int(reduce_weight.shape[0])


def blocks_of(pixels: int, channels: int, reduced: int) -> dict[str, int]:
    """Returns the constexprs and warps of the kernels that hold whole samples."""
    block_p, block_c = triton.next_power_of_2(pixels), triton.next_power_of_2(channels)
    samples = max(1, min(MOST_SAMPLES, TILE // (block_p * block_c)))
    units = max(1, min(MOST_UNITS, triton.next_power_of_2(reduced), PRODUCTS // (samples * block_c)))
    warps = WARPS if block_p * block_c <= TILE else 2 * WARPS
    return {"BLOCK_N": samples, "BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_R": units, "num_warps": warps}
