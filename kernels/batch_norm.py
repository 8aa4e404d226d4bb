"""Batch norm for training, channels last, with the additions and the ReLU around it.

Source: Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate
shift", 2015, arXiv:1502.03167; the statistics of parts are combined as in Chan, Golub and LeVeque, "Updating formulae
and a pairwise algorithm for computing sample variances", 1979.

An activation (N, C, H, W), channels last, is a matrix of N * H * W rows and C columns. Each direction takes two
launches: the first reduces parts of the rows, the second combines the few partial results, each program for its own
channels, and goes over the rows again. Where the rows are few, the second does without the first and goes over all of
them twice. There are no atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .checks import check_activation, check_like, check_tensor
from .dispatch import jit, launch, tl, triton, use_triton

Skip = Literal["input", "output"]
"""What a shortcut takes: the tensor that is normalised, or the result."""

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


class ForwardInputs(NamedTuple):
    """The arguments of `batch_norm_relu_forward`, which `batch_norm_relu` explains."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None
    addend: Tensor | None
    momentum: float
    eps: float
    relu: bool


class BackwardInputs(NamedTuple):
    """The arguments of `batch_norm_relu_backward`."""

    grad_y: Tensor
    grad_skip: Tensor | None
    x: Tensor
    y: Tensor | None
    weight: Tensor
    bias: Tensor
    statistics: Tensor
    relu: bool
    skip: str | None


def forward_reference(given: ForwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what `batch_norm_relu_forward` does, in plain torch."""
    x = given.x if given.addend is None else given.x + given.addend
    vectors = given.weight, given.bias, given.running_mean, given.running_var
    y, mean, rstd = torch.ops.aten._native_batch_norm_legit(x, *vectors, True, given.momentum, given.eps)
    if given.residual is not None:
        y = y + given.residual
    y = F.relu(y) if given.relu else y
    # The statistics are float32 already, but torch's fakes do not know it.
    return y, torch.stack((mean, rstd)).float(), x.new_empty(0) if given.addend is None else x


def backward_reference(given: BackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes what `batch_norm_relu_backward` does, in plain torch."""
    grad_y, grad_skip, x, y, weight, bias, statistics, relu, skip = given
    mean, rstd = statistics
    g = grad_y if grad_skip is None or skip == "input" else grad_y + grad_skip
    if relu:
        column = (-1, 1, 1)
        z = (x - mean.view(column)) * (rstd * weight).view(column) + bias.view(column) if y is None else y
        g = g.masked_fill(z <= 0, 0)
    # In any other layout torch rounds the gradients of weight and bias to half precision.
    g = torch.empty_like(x).copy_(g)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    grad_x = grad_x + grad_skip if skip == "input" else grad_x
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if y is None else g


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
def part_statistics_kernel(
    sum_ptr,
    x_ptr,
    addend_ptr,
    count,
    channel,
    channels,
    HAS_ADDEND: tl.constexpr,
    SPAN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Reduces the `count` rows of one part, which starts at the pointers.

    Returns the mean and the sum of squared deviations, float32 (BLOCK_C,) each. Where there is an addend it writes the
    sum.
    """
    # With d = x - shift the sum of squared deviations is sum(d^2) - sum(d)^2 / count. The shift being the mean of the
    # first tile, what cancels is at most count / TILE_ROWS times what remains, whatever the data.
    offsets, inside = tile_kernel(0, count, channel, channels, TILE_ROWS)
    x = load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND)
    if HAS_ADDEND:
        tl.store(sum_ptr + offsets, x.to(sum_ptr.dtype.element_ty), inside)
    shift = tl.sum(x, 0) / tl.minimum(count, TILE_ROWS)
    d = tl.where(inside, x - shift[None, :], 0.0)
    sums, squares = d, d * d
    for first in range(TILE_ROWS, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        x = load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND)
        if HAS_ADDEND:
            tl.store(sum_ptr + offsets, x.to(sum_ptr.dtype.element_ty), inside)
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
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = part.to(tl.int64) * SPAN
    count = tl.minimum(rows - start, SPAN).to(tl.int32)
    sum_ptr += start * channels
    x_ptr += start * channels
    addend_ptr += start * channels
    mean, m2 = part_statistics_kernel(sum_ptr, x_ptr, addend_ptr, count, channel, channels, HAS_ADDEND, SPAN, TILE_ROWS)
    partials_ptr += part * 2 * channels + channel
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
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    if PARTS == 1:
        mean, m2 = part_statistics_kernel(
            sum_ptr, x_ptr, addend_ptr, rows, channel, channels, HAS_ADDEND, SPAN, TILE_ROWS
        )
    else:
        mean, m2 = combine_statistics_kernel(partials_ptr, channel, rows, channels, SPAN, PARTS)
    rstd = tl.rsqrt(m2 / rows + eps)
    if part == 0:
        tl.store(statistics_ptr + channel, mean, present)
        tl.store(statistics_ptr + channels + channel, rstd, present)
        running_mean = tl.load(running_mean_ptr + channel, present)
        running_var = tl.load(running_var_ptr + channel, present)
        tl.store(running_mean_ptr + channel, (1 - momentum) * running_mean + momentum * mean, present)
        tl.store(running_var_ptr + channel, (1 - momentum) * running_var + momentum * (m2 / (rows - 1)), present)

    scale = rstd * tl.load(weight_ptr + channel, present, 0.0)
    bias = tl.load(bias_ptr + channel, present, 0.0)
    start = part.to(tl.int64) * SPAN  # pyright: ignore[reportAttributeAccessIssue]
    count = tl.minimum(rows - start, SPAN).to(tl.int32)
    x_ptr += start * channels
    addend_ptr += start * channels
    residual_ptr += start * channels
    y_ptr += start * channels
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        x = load_input_kernel(x_ptr, addend_ptr, offsets, inside, HAS_ADDEND)
        # The mean goes first: folded into the bias, a large one would cancel.
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + offsets, inside, 0.0).to(tl.float32)
        if RELU:
            # Unlike a maximum, this keeps a NaN, as torch does.
            y = tl.where(y <= 0, 0.0, y)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), inside)


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
def masked_gradient_kernel(grad_y, x, y, mean, scale, bias, FROM_Y: tl.constexpr, RELU: tl.constexpr):
    """Returns `grad_y` where the ReLU's output is positive, told from `y`, or from `x` as in `normalize_kernel`."""
    if FROM_Y:
        g = tl.where(y <= 0, 0.0, grad_y)
    elif RELU:
        z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        g = tl.where(z <= 0, 0.0, grad_y)
    else:
        g = grad_y
    return g


@jit
def load_gradient_kernel(grad_y_ptr, grad_skip_ptr, offsets, inside, SKIP_OF_Y: tl.constexpr):
    """Loads the gradient of y as float32, including that of its shortcut."""
    grad_y = tl.load(grad_y_ptr + offsets, inside, 0.0).to(tl.float32)
    if SKIP_OF_Y:
        grad_y += tl.load(grad_skip_ptr + offsets, inside, 0.0).to(tl.float32)
    return grad_y


@jit
def gradient_sums_kernel(
    grad_residual_ptr,
    grad_y_ptr,
    grad_skip_ptr,
    x_ptr,
    y_ptr,
    mean,
    scale,
    bias,
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

    Where it reads y, it also writes g as the gradient of the residual.
    """
    g_sums = tl.zeros((TILE_ROWS, BLOCK_C), tl.float32)
    g_x_sums = tl.zeros((TILE_ROWS, BLOCK_C), tl.float32)
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        grad_y = load_gradient_kernel(grad_y_ptr, grad_skip_ptr, offsets, inside, SKIP_OF_Y)
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, inside, 0.0).to(tl.float32) if FROM_Y else x
        g = masked_gradient_kernel(grad_y, x, y, mean, scale, bias, FROM_Y, RELU)
        if FROM_Y:
            tl.store(grad_residual_ptr + offsets, g.to(grad_residual_ptr.dtype.element_ty), inside)
        g_sums += g
        g_x_sums += g * (x - mean[None, :])
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
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    mean = tl.load(statistics_ptr + channel, present, 0.0)
    rstd = tl.load(statistics_ptr + channels + channel, present, 0.0)
    scale = rstd * tl.load(weight_ptr + channel, present, 0.0)
    bias = tl.load(bias_ptr + channel, present, 0.0)
    start = part.to(tl.int64) * SPAN
    count = tl.minimum(rows - start, SPAN).to(tl.int32)
    g_x_sum, g_sum = gradient_sums_kernel(
        grad_residual_ptr + start * channels,
        grad_y_ptr + start * channels,
        grad_skip_ptr + start * channels,
        x_ptr + start * channels,
        y_ptr + start * channels,
        mean,
        scale,
        bias,
        count,
        channel,
        channels,
        SKIP_OF_Y,
        FROM_Y,
        RELU,
        SPAN,
        BLOCK_C,
        TILE_ROWS,
    )
    partials_ptr += part * 2 * channels + channel
    tl.store(partials_ptr, g_x_sum * rstd, present)
    tl.store(partials_ptr + channels, g_sum, present)


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
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = channel < channels
    mean = tl.load(statistics_ptr + channel, present, 0.0)
    rstd = tl.load(statistics_ptr + channels + channel, present, 0.0)
    scale = rstd * tl.load(weight_ptr + channel, present, 0.0)
    bias = tl.load(bias_ptr + channel, present, 0.0)
    if PARTS == 1:
        g_x_sum, grad_bias = gradient_sums_kernel(
            grad_residual_ptr,
            grad_y_ptr,
            grad_skip_ptr,
            x_ptr,
            y_ptr,
            mean,
            scale,
            bias,
            rows,
            channel,
            channels,
            SKIP_OF_Y,
            FROM_Y,
            RELU,
            SPAN,
            BLOCK_C,
            TILE_ROWS,
        )
        grad_weight = g_x_sum * rstd
    else:
        other_part = tl.arange(0, PARTS)[:, None]
        pointers = partials_ptr + other_part * 2 * channels + channel[None, :]
        exists = (other_part * SPAN < rows) & present[None, :]
        grad_weight = tl.sum(tl.load(pointers, exists, 0.0), 0)
        grad_bias = tl.sum(tl.load(pointers + channels, exists, 0.0), 0)
    if part == 0:
        tl.store(grad_weight_ptr + channel, grad_weight, present)
        tl.store(grad_bias_ptr + channel, grad_bias, present)

    # The part of g - (grad_bias + xhat * grad_weight) / m that is the same in all rows.
    offset, slope = grad_bias / rows, grad_weight * rstd / rows
    start = part.to(tl.int64) * SPAN  # pyright: ignore[reportAttributeAccessIssue]
    count = tl.minimum(rows - start, SPAN).to(tl.int32)
    grad_y_ptr += start * channels
    grad_skip_ptr += start * channels
    x_ptr += start * channels
    y_ptr += start * channels
    grad_x_ptr += start * channels
    for first in range(0, SPAN, TILE_ROWS):
        offsets, inside = tile_kernel(first, count, channel, channels, TILE_ROWS)
        grad_y = load_gradient_kernel(grad_y_ptr, grad_skip_ptr, offsets, inside, SKIP_OF_Y)
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, inside, 0.0).to(tl.float32) if FROM_Y else x
        g = masked_gradient_kernel(grad_y, x, y, mean, scale, bias, FROM_Y, RELU)
        grad_x = scale[None, :] * (g - (offset[None, :] + (x - mean[None, :]) * slope[None, :]))
        if SKIP_OF_X:
            grad_x += tl.load(grad_skip_ptr + offsets, inside, 0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), inside)


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


def matrix_of(x: Tensor) -> tuple[int, int]:
    """Returns the rows and channels of an activation (N, C, H, W).

    They are numbers even where a graph is traced for all sizes, since kernels depend on them.
    """
    count, channels, height, width = (int(length) for length in x.shape)
    return count * height * width, channels


def launch_forward(statistics: Any, normalize: Any, given: ForwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `statistics_kernel`, unless the rows are one part, and `normalize_kernel`, both wrapped."""
    x, weight, bias, running_mean, running_var, residual, addend, momentum, eps, relu = given
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
        launch(statistics, how.grid, partials, *of_sum, rows, channels, HAS_ADDEND=has_addend, **how.blocks)
        if has_addend:
            of_sum, has_addend = (total, total, total), False
    outputs, summed = (y, saved, running_mean, running_var), (*of_sum, x if residual is None else residual)
    arguments = *outputs, *summed, weight, bias, partials, rows, channels, momentum, eps
    flags = {"HAS_ADDEND": has_addend, "HAS_RESIDUAL": residual is not None, "RELU": relu}
    launch(normalize, how.grid, *arguments, **flags, PARTS=how.parts, **how.blocks)
    return y, saved, total


def launch_backward(
    reduce_gradient: Any, input_gradient: Any, given: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `reduce_gradient_kernel`, unless the rows are one part, and `input_gradient_kernel`, both wrapped."""
    grad_y, grad_skip, x, y, weight, bias, statistics, relu, skip = given
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
    vectors = weight, bias, statistics
    flags = {"SKIP_OF_Y": skip == "output", "FROM_Y": from_y, "RELU": relu}
    if how.parts > 1:
        inputs = g, grad_skip, x, y, *vectors
        launch(reduce_gradient, how.grid, partials, of_residual, *inputs, rows, channels, **flags, **how.blocks)
        if from_y:
            g, flags = grad_residual, dict.fromkeys(flags, False)
    outputs, inputs = (grad_x, grad_weight, grad_bias, of_residual), (g, grad_skip, x, y, *vectors, partials)
    flags |= {"SKIP_OF_X": skip == "input", "PARTS": how.parts}
    launch(input_gradient, how.grid, *outputs, *inputs, rows, channels, **flags, **how.blocks)
    return grad_x, grad_weight, grad_bias, grad_residual


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
    given = ForwardInputs(x, weight, bias, running_mean, running_var, residual, addend, momentum, eps, relu)
    if use_triton(x):
        return launch_forward(wrap_triton(statistics_kernel), wrap_triton(normalize_kernel), given)
    return forward_reference(given)


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
    given = BackwardInputs(grad_y, grad_skip, x, y, weight, bias, statistics, relu, skip)
    if use_triton(x):
        return launch_backward(wrap_triton(reduce_gradient_kernel), wrap_triton(input_gradient_kernel), given)
    return backward_reference(given)


class BatchNormReLU(torch.autograd.Function):
    """Joins the two ops.

    `torch.library` registers no gradient for an op that writes its arguments, here the running statistics.
    """

    @staticmethod
    def forward(ctx: Any, skip: Skip | None, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        given = ForwardInputs(*arguments)
        y, statistics, total = batch_norm_relu_forward(*given)
        x = given.x if given.addend is None else total
        ctx.relu, ctx.skip, ctx.masks_residual = given.relu, skip, given.relu and given.residual is not None
        ctx.has_residual, ctx.has_addend = given.residual is not None, given.addend is not None
        ctx.save_for_backward(x, y if ctx.masks_residual else None, given.weight, given.bias, statistics)
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
    given = ForwardInputs(x, weight, bias, running_mean, running_var, residual, addend, momentum, eps, relu)
    check(given)
    return BatchNormReLU.apply(skip, *given)


def check(given: ForwardInputs) -> None:
    x = given.x
    check_activation("x", x)
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have more than one value per channel, which its shape {tuple(x.shape)} has not.")
    for name in ("weight", "bias", "running_mean", "running_var"):
        check_tensor(name, getattr(given, name), torch.float32, x.shape[1:2], x.device)
    check_like("residual", given.residual, x)
    check_like("addend", given.addend, x)
