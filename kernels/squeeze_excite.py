"""Squeeze-and-excitation: every channel scaled by a gate that a small network computes from the means of all channels.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507. Activations are NHWC. Where the addition
of a residual and the ReLU follow, they ride along.

A program holds whole samples in registers between pooling and scaling, and computes their gates itself: one launch
forward, and two backward, the second for the gradients of the weights. What is too large for that is left to the
reference (`fits`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional as F

from .checks import check_activation, check_like, check_tensor, described
from .dispatch import jit, launch, tl, triton, use_triton

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


class ForwardInputs(NamedTuple):
    """The arguments of `squeeze_excite_forward`, which `squeeze_excite` explains."""

    x: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    residual: Tensor | None
    relu: bool


class BackwardInputs(NamedTuple):
    """The arguments of `squeeze_excite_backward`."""

    grad_y: Tensor
    grad_skip: Tensor | None
    x: Tensor
    y: Tensor | None
    pooled: Tensor
    hidden: Tensor
    gate: Tensor
    reduce_weight: Tensor
    expand_weight: Tensor
    masks_residual: bool


def forward_reference(given: ForwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes what `squeeze_excite_forward` does, in plain torch: in float32, rounded once."""
    x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu = given
    with without_autocast(x.device):
        pooled = x.mean((2, 3), dtype=torch.float32)
        hidden = F.relu(F.linear(pooled, reduce_weight.float(), reduce_bias.float()))
        gate = F.linear(hidden, expand_weight.float(), expand_bias.float()).sigmoid()
    y = x * gate[:, :, None, None]
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    return y.to(x.dtype), pooled, hidden, gate


def backward_reference(given: BackwardInputs) -> tuple[Tensor, ...]:
    """Computes what `squeeze_excite_backward` does, in plain torch."""
    grad_y, grad_skip, x, y, pooled, hidden, gate, reduce_weight, expand_weight, masks_residual = given
    grad = grad_y if grad_skip is None else grad_y + grad_skip
    grad = grad if y is None else grad.masked_fill(y <= 0, 0)
    grad_expanded = (grad.float() * x).sum((2, 3)) * gate * (1 - gate)
    with without_autocast(x.device):
        grad_hidden = (grad_expanded @ expand_weight.float()).masked_fill(hidden <= 0, 0)
        grad_pooled = grad_hidden @ reduce_weight.float()
        grad_reduce_weight = grad_hidden.T @ pooled
        grad_expand_weight = grad_expanded.T @ hidden
    pixels = x.shape[2] * x.shape[3]
    grad_x = (grad * gate[:, :, None, None] + (grad_pooled / pixels)[:, :, None, None]).to(x.dtype)
    grad_residual = grad.clone() if masks_residual else grad.new_empty(0)
    of_weights = grad_reduce_weight, grad_hidden.sum(0), grad_expand_weight, grad_expanded.sum(0)
    return grad_x, grad_residual, *(gradient.to(reduce_weight.dtype) for gradient in of_weights)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from changing the matrix products."""
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
    expand_bias = tl.load(expand_bias_ptr + channel, is_channel, 0).to(tl.float32)
    expanded = tl.zeros((BLOCK_N, BLOCK_C), tl.float32) + expand_bias[None, :]
    for start in range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        is_unit = unit < reduced
        is_weight = is_unit[:, None] & is_channel[None, :]
        reduce_weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0)
        reduce_weight = reduce_weight.to(tl.float32)
        expand_weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0)
        expand_weight = expand_weight.to(tl.float32)
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
        is_weight = (unit < reduced)[:, None] & is_channel[None, :]
        expand_weight = tl.load(expand_weight_ptr + channel[None, :] * reduced + unit[:, None], is_weight, 0)
        expand_weight = expand_weight.to(tl.float32)
        reduce_weight = tl.load(reduce_weight_ptr + unit[:, None] * channels + channel[None, :], is_weight, 0)
        reduce_weight = reduce_weight.to(tl.float32)
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


def launch_forward(kernel: Any, given: ForwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `squeeze_excite_kernel`, wrapped."""
    x, residual = given.x, given.residual
    sizes = samples, _, channels, reduced = sizes_of(x, given.reduce_weight)
    blocks = blocks_of(*sizes[1:])
    y = torch.empty_like(x)
    pooled, gate = (torch.empty((samples, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    hidden = torch.empty((samples, reduced), dtype=torch.float32, device=x.device)
    inputs = *given[:5], x if residual is None else residual  # Some pointer, which is not read.
    flags = {"HAS_RESIDUAL": residual is not None, "RELU": given.relu}
    grid = (triton.cdiv(samples, blocks["BLOCK_N"]),)
    launch(kernel, grid, y, pooled, hidden, gate, *inputs, *sizes, **flags, **blocks)
    return y, pooled, hidden, gate


def launch_backward(kernel: Any, of_weights: Any, given: BackwardInputs) -> tuple[Tensor, ...]:
    """Launches `gradient_kernel` and `weight_gradient_kernel`, both wrapped."""
    grad_y, grad_skip, x, y, pooled, hidden, gate, reduce_weight, expand_weight, masks_residual = given
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
    launch(kernel, (triton.cdiv(samples, blocks["BLOCK_N"]),), *outputs, *inputs, *sizes, **flags, **blocks)

    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    gradients = [torch.empty(shape, dtype=reduce_weight.dtype, device=x.device) for shape in shapes]
    grid = triton.cdiv(reduced, WEIGHT_GRADIENT["BLOCK_R"]), triton.cdiv(channels, WEIGHT_GRADIENT["BLOCK_C"])
    inputs = pooled, hidden, grad_hidden, grad_expanded
    launch(of_weights, grid, *gradients, *inputs, samples, channels, reduced, **WEIGHT_GRADIENT)
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
    """Computes `squeeze_excite` together with what its gradient needs.

    Returns y and, in float32, pooled (N, C), hidden (N, R) and gate (N, C).
    """
    given = ForwardInputs(x, reduce_weight, reduce_bias, expand_weight, expand_bias, residual, relu)
    check(given)
    if use_triton(x) and fits(x, reduce_weight):
        return launch_forward(wrap_triton(squeeze_excite_kernel), given)
    return forward_reference(given)


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
    given = BackwardInputs(grad_y, grad_skip, x, y, pooled, hidden, gate, reduce_weight, expand_weight, masks_residual)
    if use_triton(x) and fits(x, reduce_weight):
        return launch_backward(wrap_triton(gradient_kernel), wrap_triton(weight_gradient_kernel), given)  # pyright: ignore[reportReturnType]
    return backward_reference(given)  # pyright: ignore[reportReturnType]


class SqueezeExcite(torch.autograd.Function):
    """Joins the two ops; `torch.library` lets no op return a tensor twice."""

    @staticmethod
    def forward(ctx: Any, skip: bool, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        given = ForwardInputs(*arguments)
        y, *intermediates = squeeze_excite_forward(*given)
        has_residual, relu = given.residual is not None, given.relu
        ctx.save_for_backward(given.x, y if relu else None, *intermediates, given.reduce_weight, given.expand_weight)
        ctx.has_residual, ctx.masks_residual = has_residual, has_residual and (relu or skip)
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


def check(given: ForwardInputs) -> None:
    x, weight = given.x, given.reduce_weight
    check_activation("x", x)
    if weight.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"reduce_weight must be float32 or, like x, {x.dtype}, not {weight.dtype}.")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"reduce_weight must be (R, C), not {described(weight)}.")
    reduced, channels = weight.shape[0], x.shape[1]
    shapes = {"reduce_weight": (reduced, channels), "reduce_bias": (reduced,)}
    shapes |= {"expand_weight": (channels, reduced), "expand_bias": (channels,)}
    for name, shape in shapes.items():
        check_tensor(name, getattr(given, name), weight.dtype, shape, x.device)
    check_like("residual", given.residual, x)
