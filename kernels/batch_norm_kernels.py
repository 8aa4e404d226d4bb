"""The Triton kernels of `batch_norm`, and how they share the rows and channels of an activation.

The statistics of parts are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances", 1979.
"""

from __future__ import annotations

from typing import NamedTuple

from .dispatch import jit, tl, triton

# Rows of 32 half-precision channels are 64 bytes, two sectors of memory; fewer channels a program leave more programs
# to share them. A tile is 16 elements a thread of eight warps, two loads of 16 bytes. Twice that takes more than 200
# registers in the backward reduction, which leaves room for one program on a multiprocessor. Chosen by the compiled
# code, not by timing.
MOST_CHANNELS = 32
MOST_PARTS = 256

# So many rows, such as those of 128 maps of 2 by 2 pixels, are one part, of which a program holds as many channels:
# saving a launch is worth more than the programs that are then missing (estimated, not timed).
ROWS_OF_ONE_PART = 512
CHANNELS_OF_ONE_PART = 16

TILE = 4096
WARPS = 8


@jit
def share_kernel(rows, SPAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gives the first row of a program, int64, how many rows are its own, and its channels, int32 (BLOCK_C,)."""
    start = tl.program_id(0).to(tl.int64) * SPAN
    return start, tl.minimum(rows - start, SPAN).to(tl.int32), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@jit
def tile_kernel(first, count, channel, channels, TILE_ROWS: tl.constexpr):
    """Gives the offsets of rows from `first` on, int32 (TILE_ROWS, BLOCK_C), and which lie within `count` rows.

    It must not load: torch assumes that the result of a function derives from all its arguments, and that a pointer
    among them is written along with it.
    """
    row = first + tl.arange(0, TILE_ROWS)[:, None]
    return row * channels + channel[None, :], (row < count) & (channel < channels)[None, :]


@jit
def load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND: tl.constexpr):
    """Loads the tensor to normalise as float32: x, or the sum as it is stored, rounded to the dtype of x."""
    x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
    if HAS_ADDEND:
        x += tl.load(addend_ptr + offsets, inside, 0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@jit
def take_input_kernel(summed, first, count, channel, channels, HAS_ADDEND: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Loads a tile of the tensor to normalise, and tells which elements exist; with an addend it writes the sum."""
    sum_ptr, x_ptr, addend_ptr = summed
    offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
    x = load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND)
    if HAS_ADDEND:
        tl.store(sum_ptr + offsets, x.to(sum_ptr.dtype.element_ty), inside)
    return x, inside


@jit
def part_statistics_kernel(
    summed, count, channel, channels, HAS_ADDEND: tl.constexpr, SPAN: tl.constexpr, TILE_ROWS: tl.constexpr
):
    """Reduces the `count` rows of one part, which starts at the pointers `summed`: to the sum, x and the addend.

    Returns the mean and the sum of squared deviations, float32 (BLOCK_C,) each. Where there is an addend it writes the
    sum.
    """
    # With d = x - shift the sum of squared deviations is sum(d^2) - sum(d)^2 / count. The shift being the mean of the
    # first tile, what cancels is at most count / TILE_ROWS times what remains, whatever the data.
    x, inside = take_input_kernel(summed, 0, count, channel, channels, HAS_ADDEND, TILE_ROWS)
    shift = tl.sum(x, 0) / tl.minimum(count, TILE_ROWS)
    d = tl.where(inside, x - shift[None, :], 0.0)
    sums, squares = d, d * d
    for first in range(TILE_ROWS, SPAN, TILE_ROWS):
        x, inside = take_input_kernel(summed, first, count, channel, channels, HAS_ADDEND, TILE_ROWS)
        d = tl.where(inside, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 0)
    return shift + total / count, tl.maximum(tl.sum(squares, 0) - total * total / count, 0.0)


@jit
def statistics_kernel(
    partials_ptr,
    sum_ptr,
    x_ptr,
    addend_ptr,
    rows,
    channels,
    HAS_ADDEND: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    start, count, channel = share_kernel(rows, SPAN, BLOCK_C)
    start *= channels
    summed = sum_ptr + start, x_ptr + start, addend_ptr + start
    mean, m2 = part_statistics_kernel(summed, count, channel, channels, HAS_ADDEND, SPAN, TILE_ROWS)
    partials_ptr += tl.program_id(0) * 2 * channels + channel
    tl.store(partials_ptr, mean, channel < channels)
    tl.store(partials_ptr + channels, m2, channel < channels)


@jit
def combine_statistics_kernel(partials_ptr, channel, rows, channels, SPAN: tl.constexpr, PARTS: tl.constexpr):
    """Combines the statistics of the parts into those of all rows (Chan et al.).

    Returns the mean and the sum of squared deviations, float32 (BLOCK_C,) each.
    """
    part = tl.arange(0, PARTS)
    count = tl.minimum(tl.maximum(rows - part * SPAN, 0), SPAN)[:, None]
    pointers = partials_ptr + part[:, None] * 2 * channels + channel[None, :]
    inside = (count > 0) & (channel < channels)[None, :]
    means, m2s = tl.load(pointers, inside, 0.0), tl.load(pointers + channels, inside, 0.0)
    # Differences from one of them are small where the mean is large: only the mean itself is rounded at its size.
    some_mean = tl.load(partials_ptr + channel, channel < channels, 0.0)
    mean = some_mean + tl.sum(count * (means - some_mean[None, :]), 0) / rows
    deviation = means - mean[None, :]
    return mean, tl.sum(m2s + count * deviation * deviation, 0)


@jit
def normalize_kernel(
    y_ptr,
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    sum_ptr,
    x_ptr,
    addend_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    rows,
    channels,
    momentum,
    eps,
    HAS_ADDEND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    start, count, channel = share_kernel(rows, SPAN, BLOCK_C)
    start *= channels
    x_ptr += start
    addend_ptr += start
    present = channel < channels
    if PARTS == 1:
        summed = sum_ptr + start, x_ptr, addend_ptr
        mean, m2 = part_statistics_kernel(summed, count, channel, channels, HAS_ADDEND, SPAN, TILE_ROWS)
    else:
        mean, m2 = combine_statistics_kernel(partials_ptr, channel, rows, channels, SPAN, PARTS)
    rstd = tl.rsqrt(m2 / rows + eps)
    if tl.program_id(0) == 0:
        tl.store(statistics_ptr + channel, mean, present)
        tl.store(statistics_ptr + channels + channel, rstd, present)
        running_mean = tl.load(running_mean_ptr + channel, present)
        running_var = tl.load(running_var_ptr + channel, present)
        tl.store(running_mean_ptr + channel, (1 - momentum) * running_mean + momentum * mean, present)
        tl.store(running_var_ptr + channel, (1 - momentum) * running_var + momentum * (m2 / (rows - 1)), present)

    scale = rstd * tl.load(weight_ptr + channel, present, 0.0)
    bias = tl.load(bias_ptr + channel, present, 0.0)
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        x = load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND)
        # The mean goes first: folded into the bias, a large one would cancel.
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + start + offsets, inside, 0.0).to(tl.float32)
        if RELU:
            # Unlike a maximum, this keeps a NaN, as torch does.
            y = tl.where(y <= 0, 0.0, y)
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), inside)


# The gradients. Per channel, with m rows, xhat = (x - mean) * rstd and z = xhat * weight + bias (+ residual), y =
# max(z, 0):
#
#     g = dL/dz = grad_y where z > 0, else 0        (grad_y without the ReLU)      grad_residual = g
#     grad_bias = sum(g)                            grad_weight = sum(g * xhat)
#     grad_x = weight * rstd * (g - (grad_bias + xhat * grad_weight) / m)
#
# for dL/dxhat = g * weight, and xhat depends on x directly and through mean and rstd: d xhat_i / d x_j = rstd * ([i =
# j] - 1 / m - xhat_i * xhat_j / m).
#
# Where z > 0 is taken from x where there is no residual: x is read anyhow, and y need not be, nor kept for it. With a
# residual either that or y has to be read besides, and y it is, which the next convolution keeps anyhow. The first
# launch then writes g, which is the gradient of the residual, and the second, if there are two, reads g in place of
# grad_y and y.
#
# Along a shortcut comes grad_skip: where it takes y, it is added to grad_y, where it takes x, to grad_x. Of a sum,
# grad_x is the gradient of both summands.


@jit
def load_vectors_kernel(statistics_ptr, weight_ptr, bias_ptr, channel, channels):
    """Loads mean, 1 / std and bias, and computes weight / std: float32 (BLOCK_C,) each."""
    present = channel < channels
    mean = tl.load(statistics_ptr + channel, present, 0.0)
    rstd = tl.load(statistics_ptr + channels + channel, present, 0.0)
    return mean, rstd, rstd * tl.load(weight_ptr + channel, present, 0.0), tl.load(bias_ptr + channel, present, 0.0)


@jit
def load_gradient_kernel(
    activations, vectors, offsets, inside, SKIP_OF_Y: tl.constexpr, FROM_Y: tl.constexpr, RELU: tl.constexpr
):
    """Loads a tile of g, and of x - mean, as float32: `activations` point to grad_y, grad_skip, x and y."""
    grad_y_ptr, grad_skip_ptr, x_ptr, y_ptr = activations
    mean, scale, bias = vectors
    g = tl.load(grad_y_ptr + offsets, inside, 0.0).to(tl.float32)
    if SKIP_OF_Y:
        g += tl.load(grad_skip_ptr + offsets, inside, 0.0).to(tl.float32)
    deviation = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32) - mean[None, :]
    if FROM_Y:
        g = tl.where(tl.load(y_ptr + offsets, inside, 0.0).to(tl.float32) <= 0, 0.0, g)
    elif RELU:
        g = tl.where(deviation * scale[None, :] + bias[None, :] <= 0, 0.0, g)
    return g, deviation


@jit
def gradient_sums_kernel(
    g_ptr,
    activations,
    vectors,
    count,
    channel,
    channels,
    SKIP_OF_Y: tl.constexpr,
    FROM_Y: tl.constexpr,
    RELU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Sums g * (x - mean) and g over one part, float32 (BLOCK_C,) each.

    Where it reads y, it also writes g, as the gradient of the residual.
    """
    g_sums = tl.zeros((TILE_ROWS, BLOCK_C), tl.float32)
    g_x_sums = tl.zeros((TILE_ROWS, BLOCK_C), tl.float32)
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        g, deviation = load_gradient_kernel(activations, vectors, offsets, inside, SKIP_OF_Y, FROM_Y, RELU)
        if FROM_Y:
            tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), inside)
        g_sums += g
        g_x_sums += g * deviation
    return tl.sum(g_x_sums, 0), tl.sum(g_sums, 0)


@jit
def reduce_gradient_kernel(
    partials_ptr,
    grad_residual_ptr,
    grad_y_ptr,
    grad_skip_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    rows,
    channels,
    SKIP_OF_Y: tl.constexpr,
    FROM_Y: tl.constexpr,
    RELU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    start, count, channel = share_kernel(rows, SPAN, BLOCK_C)
    start *= channels
    mean, rstd, scale, bias = load_vectors_kernel(statistics_ptr, weight_ptr, bias_ptr, channel, channels)
    activations = grad_y_ptr + start, grad_skip_ptr + start, x_ptr + start, y_ptr + start
    g_ptr, vectors = grad_residual_ptr + start, (mean, scale, bias)
    g_x_sum, g_sum = gradient_sums_kernel(
        g_ptr, activations, vectors, count, channel, channels, SKIP_OF_Y, FROM_Y, RELU, SPAN, BLOCK_C, TILE_ROWS
    )
    partials_ptr += tl.program_id(0) * 2 * channels + channel
    tl.store(partials_ptr, g_x_sum * rstd, channel < channels)
    tl.store(partials_ptr + channels, g_sum, channel < channels)


@jit
def combine_sums_kernel(partials_ptr, channel, rows, channels, SPAN: tl.constexpr, PARTS: tl.constexpr):
    """Adds up what `reduce_gradient_kernel` left for each part: float32 (BLOCK_C,) each."""
    part = tl.arange(0, PARTS)[:, None]
    pointers = partials_ptr + part * 2 * channels + channel[None, :]
    inside = (part * SPAN < rows) & (channel < channels)[None, :]
    return tl.sum(tl.load(pointers, inside, 0.0), 0), tl.sum(tl.load(pointers + channels, inside, 0.0), 0)


@jit
def input_gradient_kernel(
    grad_x_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_residual_ptr,
    grad_y_ptr,
    grad_skip_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    partials_ptr,
    rows,
    channels,
    SKIP_OF_X: tl.constexpr,
    SKIP_OF_Y: tl.constexpr,
    FROM_Y: tl.constexpr,
    RELU: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    start, count, channel = share_kernel(rows, SPAN, BLOCK_C)
    start *= channels
    mean, rstd, scale, bias = load_vectors_kernel(statistics_ptr, weight_ptr, bias_ptr, channel, channels)
    activations = grad_y_ptr + start, grad_skip_ptr + start, x_ptr + start, y_ptr + start
    g_ptr, vectors = grad_residual_ptr + start, (mean, scale, bias)
    if PARTS == 1:
        g_x_sum, grad_bias = gradient_sums_kernel(
            g_ptr, activations, vectors, count, channel, channels, SKIP_OF_Y, FROM_Y, RELU, SPAN, BLOCK_C, TILE_ROWS
        )
        grad_weight = g_x_sum * rstd
    else:
        grad_weight, grad_bias = combine_sums_kernel(partials_ptr, channel, rows, channels, SPAN, PARTS)
    if tl.program_id(0) == 0:
        tl.store(grad_weight_ptr + channel, grad_weight, channel < channels)
        tl.store(grad_bias_ptr + channel, grad_bias, channel < channels)

    # The part of g - (grad_bias + xhat * grad_weight) / m that is the same in all rows.
    offset, slope = grad_bias / rows, grad_weight * rstd / rows
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        g, deviation = load_gradient_kernel(activations, vectors, offsets, inside, SKIP_OF_Y, FROM_Y, RELU)
        grad_x = scale[None, :] * (g - (offset[None, :] + deviation * slope[None, :]))
        if SKIP_OF_X:
            grad_x += tl.load(grad_skip_ptr + start + offsets, inside, 0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), inside)


class Split(NamedTuple):
    """How the rows and channels of an activation are shared among the programs, alike in all launches."""

    span: int
    """Rows of a part; the last one may have fewer."""
    grid: tuple[int, int]
    """Numbers of parts and of blocks of channels."""
    parts: int
    """The number of parts, rounded up to a power of two."""
    block_c: int
    """Channels of a program, a power of two."""
    tile_rows: int
    """Rows that a program holds at once, a power of two."""

    @property
    def blocks(self) -> dict[str, int]:
        """Returns the options of every launch."""
        return {"SPAN": self.span, "BLOCK_C": self.block_c, "TILE_ROWS": self.tile_rows, "num_warps": WARPS}


def split(rows: int, channels: int) -> Split:
    """Chooses the split by the shape alone.

    A program reads the partial results of all P parts, 8 P bytes a channel, besides rows / P activations, at least 4
    bytes each with what is written. With 4 P^2 <= rows the former are at most half of the latter, and come from the
    cache.
    """
    one_part = rows <= ROWS_OF_ONE_PART
    block_c = min(CHANNELS_OF_ONE_PART if one_part else MOST_CHANNELS, triton.next_power_of_2(channels))
    most_parts = 1 if one_part else 1 << ((rows // 4).bit_length() - 1) // 2
    span = triton.cdiv(rows, min(most_parts, MOST_PARTS))
    parts = triton.cdiv(rows, span)
    tile_rows = min(triton.next_power_of_2(max(span, 16)), TILE // block_c)
    return Split(span, (parts, triton.cdiv(channels, block_c)), triton.next_power_of_2(parts), block_c, tile_rows)
