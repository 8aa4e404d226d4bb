"""Stochastic gradient descent with Nesterov momentum, with averages and a low-precision copy of the weights: one pass over memory.

Parameters, momenta, averages and the copy lie in flat buckets (`fastcifar.averaging.flatten`), but autograd leaves each gradient in a
tensor of its own. The kernel finds them by their addresses, in one launch for any number of tensors.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, in the form of `torch.optim.SGD`;
a table of addresses as in NVIDIA's apex (`multi_tensor_apply`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.optim.sgd import sgd

from .averaging import check_averages, ema_update_reference, move_kernel, pieces
from .compilation import Compilation
from .dispatch import is_traced, jit, launcher, tl, use_triton
from .spec import Arguments, Case, OpSpec

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHADOW_DTYPES = (torch.bfloat16, torch.float16)

ALIGNMENT = 16
"""Of a parameter in its bucket, in elements; of a gradient in memory, in bytes."""

# As in averaging.py: a thread holds four elements, 16 bytes of float32.
BLOCK = 1024
WARPS = 8


def gradient_table(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Where the kernel finds what it updates: int64 (B, 3), a row for each block of `BLOCK` elements, on the device of the gradients.

    A row holds the address of the block's gradient, its first element in the bucket, and the number of its elements. The table holds for
    as long as the gradients stay where they are: for ever in a captured graph, otherwise until one has another `data_ptr()`.

    Args:
        parameters: views of one flat bucket, at the start of its storage; each from a multiple of 16 elements on.
        gradients: one for each, of its shape and strides, dense, at a multiple of 16 bytes.

    Raises:
        ValueError: a gradient differs from its parameter in shape or strides, or one of them is not aligned.
    """
    blocks = []
    for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient.shape != parameter.shape or gradient.stride() != parameter.stride():
            ours, theirs = ((tuple(tensor.shape), tensor.stride()) for tensor in (gradient, parameter))
            raise ValueError(f"gradients[{number}] must have shape and strides {theirs} like its parameter, not {ours}.")
        if gradient.data_ptr() % ALIGNMENT:
            raise ValueError(f"gradients[{number}] must start at a multiple of {ALIGNMENT} bytes, not at {gradient.data_ptr()}.")
        if parameter.storage_offset() % ALIGNMENT:
            offset = parameter.storage_offset()
            raise ValueError(f"parameters[{number}] must start at a multiple of {ALIGNMENT} elements of its bucket, not at {offset}.")
        first = torch.arange(0, gradient.numel(), BLOCK)
        addresses = gradient.data_ptr() + first * gradient.element_size()
        blocks.append(torch.stack((addresses, parameter.storage_offset() + first, (gradient.numel() - first).clamp(max=BLOCK)), dim=1))
    table, device = torch.cat(blocks), gradients[0].device
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor, as one vector that shares its memory."""
    return tensor.permute(_memory_order(tensor)).reshape(-1)


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


@torch.no_grad()
def sgd_update_reference(
    parameters: Tensor,
    momenta: Tensor,
    gradients: Sequence[Tensor],
    table: Tensor,
    offsets: Sequence[int],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    averages: Tensor | None = None,
    decays: Tensor | None = None,
    shadow: Tensor | None = None,
    inverse_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """What `sgd_update_` computes, in plain torch: each operation rounds to float32."""
    skipped = None if found_inf is None else found_inf != 0
    for gradient, offset in zip(map(in_memory_order, gradients), offsets, strict=True):
        for piece in pieces(gradient):
            slope = gradient[piece].float()
            if inverse_scale is not None:
                slope = slope * inverse_scale
            place = slice(offset + piece.start, offset + min(piece.stop, gradient.numel()))
            parameter, velocity = parameters[place], momenta[place]
            slope = parameter.mul(weight_decay).add_(slope)
            moved = velocity.mul(momentum).add_(slope)
            slope = moved.mul(momentum).add_(slope).mul_(lr)
            velocity.copy_(moved if skipped is None else torch.where(skipped, velocity, moved))
            parameter.sub_(slope if skipped is None else slope.masked_fill_(skipped, 0))
            if averages is not None:
                ema_update_reference(averages[..., place], parameter, decays)
            if shadow is not None:
                shadow[place].copy_(parameter)


@jit
def sgd_block_kernel(
    parameters_ptr,
    momenta_ptr,
    gradient_ptr,
    averages_ptr,
    shadow_ptr,
    lr_ptr,
    decays_ptr,
    inverse_scale_ptr,
    found_inf_ptr,
    length,
    count,
    momentum,
    weight_decay,
    AVERAGES: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates `count` elements from the pointers on: all of the block where FULL, and then 16 bytes at a time."""
    offsets = tl.arange(0, BLOCK)
    inside = tl.full((BLOCK,), True, tl.int1) if FULL else offsets < count
    slope = tl.load(gradient_ptr + offsets, inside).to(tl.float32)
    parameter = tl.load(parameters_ptr + offsets, inside)
    velocity = tl.load(momenta_ptr + offsets, inside)
    # Adding zero makes a product round by itself, as in `move_kernel`.
    if HAS_SCALE:
        slope = tl.fma(slope, tl.load(inverse_scale_ptr), 0.0)
    slope = tl.fma(parameter, weight_decay, 0.0) + slope
    moved = tl.fma(velocity, momentum, 0.0) + slope
    result = parameter - tl.fma(tl.fma(moved, momentum, 0.0) + slope, tl.load(lr_ptr), 0.0)
    if HAS_FOUND_INF:
        skipped = tl.load(found_inf_ptr) != 0
        moved = tl.where(skipped, velocity, moved)
        result = tl.where(skipped, parameter, result)
    tl.store(momenta_ptr + offsets, moved, inside)
    tl.store(parameters_ptr + offsets, result, inside)
    if HAS_SHADOW:
        tl.store(shadow_ptr + offsets, result.to(shadow_ptr.dtype.element_ty), inside)
    for row in tl.static_range(AVERAGES):
        average = tl.load(averages_ptr + offsets, inside)
        tl.store(averages_ptr + offsets, move_kernel(average, result, 1 - tl.load(decays_ptr + row)), inside)
        averages_ptr += length


@jit
def sgd_kernel(
    parameters_ptr,
    momenta_ptr,
    gradient_ptr,
    table_ptr,
    lr_ptr,
    averages_ptr,
    decays_ptr,
    shadow_ptr,
    inverse_scale_ptr,
    found_inf_ptr,
    length,
    momentum,
    weight_decay,
    GATHERED: tl.constexpr,
    AVERAGES: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr = table_ptr + tl.program_id(0) * 3
    position = tl.multiple_of(tl.load(row_ptr + 1), 16)
    count = tl.load(row_ptr + 2)
    if GATHERED:
        gradient_ptr += position
    else:
        # Of the tensor that was passed only the dtype is used.
        gradient_ptr = tl.multiple_of(tl.load(row_ptr).to(gradient_ptr.dtype), 16)
    parameters_ptr += position
    momenta_ptr += position
    averages_ptr += position
    shadow_ptr += position
    if count == BLOCK:
        sgd_block_kernel(
            parameters_ptr, momenta_ptr, gradient_ptr, averages_ptr, shadow_ptr, lr_ptr, decays_ptr, inverse_scale_ptr, found_inf_ptr,
            length, count, momentum, weight_decay, AVERAGES, HAS_SHADOW, HAS_SCALE, HAS_FOUND_INF, True, BLOCK,
        )  # fmt: skip
    else:
        sgd_block_kernel(
            parameters_ptr, momenta_ptr, gradient_ptr, averages_ptr, shadow_ptr, lr_ptr, decays_ptr, inverse_scale_ptr, found_inf_ptr,
            length, count, momentum, weight_decay, AVERAGES, HAS_SHADOW, HAS_SCALE, HAS_FOUND_INF, False, BLOCK,
        )  # fmt: skip


@launcher
def launch_sgd_update(
    kernel: Any,
    parameters: Tensor,
    momenta: Tensor,
    gradients: Sequence[Tensor],
    table: Tensor,
    offsets: Sequence[int],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    averages: Tensor | None = None,
    decays: Tensor | None = None,
    shadow: Tensor | None = None,
    inverse_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Launches `kernel`, which is `sgd_kernel` or its wrapped form, over all blocks of `table`.

    In a graph that is being traced, gradients have no addresses yet, and only a kernel that is given their values runs after what computes
    them. So they are gathered into a bucket first.
    """
    gathered = is_traced(parameters)
    gradient = _gather(gradients, offsets, parameters.numel()) if gathered else gradients[0]
    kernel[(len(table),)](
        parameters,
        momenta,
        gradient,
        table,
        lr,
        # An absent tensor needs some pointer, which is not read.
        *(lr if tensor is None else tensor for tensor in (averages, decays, shadow, inverse_scale, found_inf)),
        parameters.numel(),
        momentum,
        weight_decay,
        GATHERED=gathered,
        AVERAGES=0 if decays is None else int(decays.numel()),
        HAS_SHADOW=shadow is not None,
        HAS_SCALE=inverse_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _gather(gradients: Sequence[Tensor], offsets: Sequence[int], length: int) -> Tensor:
    """The gradients as they would lie in the bucket: (N,) of their dtype, zero between them."""
    parts, end = [], 0
    for gradient, offset in zip(gradients, offsets, strict=True):
        parts += [gradient.new_zeros(offset - end), in_memory_order(gradient)]
        end = offset + gradient.numel()
    return torch.cat([*parts, gradients[0].new_zeros(length - end)])


# Without defaults: torch 2.11 fails where an optional argument that is written in place is left out.
@triton_op("fastcifar::sgd_update_", mutates_args={"parameters", "momenta", "averages", "shadow"})
def sgd_update_(
    parameters: Tensor,
    momenta: Tensor,
    gradients: Sequence[Tensor],
    table: Tensor,
    offsets: Sequence[int],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    averages: Tensor | None,
    decays: Tensor | None,
    shadow: Tensor | None,
    inverse_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of SGD with Nesterov momentum, in place and in float32, followed by averages and a copy in low precision.

        gradient = gradient * inverse_scale + weight_decay * parameter
        momenta = momentum * momenta + gradient
        parameter = parameter - lr * (gradient + momentum * momenta)
        averages += (1 - decay) * (parameter - averages)
        shadow = parameter

    What is None is left out. Where `found_inf` is not zero, parameters and momenta stay; averages and shadow follow as ever. Whatever lies
    between the parameters in a bucket stays. Scalars stay on the device: no host sync, no new graph capture where they change.

    The gradients are read at the addresses in `table`, without a look at whether they are still there. Under `torch.compile` they are
    gathered first, which costs a pass over them.

    Args:
        parameters: (N,) float32, contiguous; does not require grad.
        momenta: (N,) float32, contiguous; zero before the first step.
        gradients: T tensors, dense in the memory order of their parameters, all float32, bfloat16 or float16.
        table: (B, 3) int64, contiguous, `gradient_table` of these gradients.
        offsets: T numbers, where each parameter starts in its bucket (`storage_offset()`), in ascending order: multiples of 16.
        lr: () float32, the learning rate.
        momentum: the share of the momentum that is kept.
        weight_decay: L2 penalty on all parameters.
        averages: (N,), or (K, N) for K = 1 to 4 decays, float32, contiguous; does not require grad.
        decays: (), or (K,), float32, contiguous; with `averages` only.
        shadow: (N,) bfloat16 or float16, contiguous; does not require grad.
        inverse_scale: () float32, the reciprocal of a `GradScaler`'s scale.
        found_inf: () float32, not zero where the step is to be skipped.

    All tensors are on the device of `parameters`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides, device or value, or what is written requires grad.
    """
    _check_buckets(parameters, momenta, averages, decays, shadow)
    _check_gradients(parameters, gradients, table, offsets)
    for name, scalar in (("lr", lr), ("inverse_scale", inverse_scale), ("found_inf", found_inf)):
        if scalar is not None:
            _check_tensor(name, scalar, (torch.float32,), (), parameters)
    arguments = gradients, table, offsets, lr, momentum, weight_decay, averages, decays, shadow, inverse_scale, found_inf
    if use_triton(parameters):
        launch_sgd_update(wrap_triton(sgd_kernel), parameters, momenta, *arguments)
    else:
        sgd_update_reference(parameters, momenta, *arguments)


def _check_buckets(parameters: Tensor, momenta: Tensor, averages: Tensor | None, decays: Tensor | None, shadow: Tensor | None) -> None:
    length = (parameters.numel(),)
    _check_tensor("parameters", parameters, (torch.float32,), length, parameters)
    _check_tensor("momenta", momenta, (torch.float32,), length, parameters)
    if (averages is None) != (decays is None):
        raise ValueError("decays must be given with averages, and only with them.")
    if averages is not None:
        check_averages(averages, decays)
        _check_tensor("averages", averages, (torch.float32,), (*averages.shape[:-1], *length), parameters)
    if shadow is not None:
        _check_tensor("shadow", shadow, SHADOW_DTYPES, length, parameters)
    for name, tensor in (("parameters", parameters), ("momenta", momenta), ("shadow", shadow)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad, since it is written in place.")


def _check_gradients(parameters: Tensor, gradients: Sequence[Tensor], table: Tensor, offsets: Sequence[int]) -> None:
    if not gradients:
        raise ValueError("gradients must be one tensor or more, not none.")
    if len(offsets) != len(gradients):
        raise ValueError(f"offsets must be {len(gradients)}, as many as gradients, not {len(offsets)}.")
    end = 0
    for number, (gradient, offset) in enumerate(zip(gradients, offsets, strict=True)):
        if gradient.dtype not in GRADIENT_DTYPES or gradient.dtype != gradients[0].dtype:
            raise TypeError(f"gradients must all be float32, bfloat16 or float16; gradients[{number}] is {gradient.dtype}.")
        if gradient.device != parameters.device:
            raise ValueError(f"gradients must be on {parameters.device} like parameters; gradients[{number}] is on {gradient.device}.")
        if not (gradient.is_contiguous() or gradient.permute(_memory_order(gradient)).is_contiguous()):
            raise ValueError(f"gradients must be dense; gradients[{number}] is {tuple(gradient.shape)} with strides {gradient.stride()}.")
        if offset % ALIGNMENT or offset < end:
            raise ValueError(
                f"offsets must be ascending multiples of {ALIGNMENT}, beyond the parameter before; offsets[{number}] is {offset}."
            )
        end = offset + gradient.numel()
    if end > parameters.numel():
        raise ValueError(f"parameters must be of {end} elements or more, where the last one ends, not {parameters.numel()}.")
    _check_tensor("table", table, (torch.int64,), (sum(-(-gradient.numel() // BLOCK) for gradient in gradients), 3), parameters)


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], parameters: Tensor) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}.")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous of shape {shape}, not {tuple(tensor.shape)} with strides {tensor.stride()}.")
    if tensor.device != parameters.device:
        raise ValueError(f"{name} must be on {parameters.device} like parameters, not on {tensor.device}.")


COMPILATIONS = [
    Compilation(
        kernel=sgd_kernel,
        signature={
            **dict.fromkeys(("parameters_ptr", "momenta_ptr"), "*fp32:16"),
            "gradient_ptr": f"*{gradient}:16",
            "table_ptr": "*i64:16",
            **dict.fromkeys(("lr_ptr", "averages_ptr", "decays_ptr"), "*fp32:16"),
            "shadow_ptr": f"*{shadow or 'fp32'}:16",
            **dict.fromkeys(("inverse_scale_ptr", "found_inf_ptr"), "*fp32:16"),
            "length": length,
            **dict.fromkeys(("momentum", "weight_decay"), "fp32"),
        },
        constexprs={
            "GATHERED": gathered,
            "AVERAGES": averages,
            "HAS_SHADOW": bool(shadow),
            "HAS_SCALE": scaled,
            "HAS_FOUND_INF": scaled,
            "BLOCK": BLOCK,
        },
        num_warps=WARPS,
    )
    for gradient, shadow, averages, scaled, gathered, length in (
        ("fp32", None, 0, False, False, "i32:16"),
        ("fp32", None, 1, False, False, "i32:16"),
        ("bf16", "bf16", 1, False, False, "i32:16"),
        ("fp16", "fp16", 1, True, False, "i32:16"),
        ("fp32", "bf16", 4, True, False, "i64"),
        ("fp32", None, 1, False, True, "i32:16"),
        ("fp16", "fp16", 4, True, True, "i32"),
    )
]


def _make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    shapes, count = shape["parameters"], shape["averages"]
    offsets = list(accumulate((-(-prod(size) // ALIGNMENT) * ALIGNMENT for size in shapes), initial=0))
    parameters, momenta = torch.zeros(2, offsets[-1], device=device)
    views, gradients = [], []
    for size, offset in zip(shapes, offsets, strict=False):
        # Convolutions lie in channels_last, as networks train.
        template = torch.empty(size).contiguous(memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format)
        views.append(parameters.as_strided(size, template.stride(), offset).normal_())
        momenta[offset : offset + prod(size)].normal_()
        gradients.append(torch.empty_like(template, dtype=dtype, device=device).normal_())
    return {
        "parameters": parameters,
        "momenta": momenta,
        "gradients": gradients,
        "table": gradient_table(views, gradients),
        "offsets": offsets[:-1],
        "lr": torch.tensor(0.1, device=device),
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "averages": parameters.roll(1).mul_(parameters != 0).repeat(count, 1) if count else None,
        "decays": torch.tensor([0.99, 0.9, 0.999, 0.5], device=device)[:count] if count else None,
        "shadow": torch.zeros_like(parameters, dtype=dtype) if dtype in SHADOW_DTYPES else None,
        "inverse_scale": torch.tensor(2.0**-7, device=device) if shape["scaled"] else None,
        "found_inf": torch.zeros((), device=device) if shape["scaled"] else None,
    }


def _torch_sgd(
    parameters: Tensor,
    momenta: Tensor,
    gradients: Sequence[Tensor],
    table: Tensor,
    offsets: Sequence[int],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    averages: Tensor | None = None,
    decays: Tensor | None = None,
    shadow: Tensor | None = None,
    inverse_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Fused `torch.optim.SGD`, interpolation, and a cast; exact in float64. What lies between the parameters must be zero."""
    # Fused SGD writes the unscaled gradients back.
    slopes = [in_memory_order(gradient).to(parameters.dtype, copy=inverse_scale is not None) for gradient in gradients]
    parts = [
        [bucket[offset : offset + len(slope)] for slope, offset in zip(slopes, offsets, strict=True)] for bucket in (parameters, momenta)
    ]
    sgd(
        parts[0],
        slopes,
        parts[1],
        fused=True,
        grad_scale=None if inverse_scale is None else (1 / inverse_scale).float(),
        found_inf=None if found_inf is None else found_inf.float(),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0,
        nesterov=True,
        maximize=False,
    )
    if averages is not None:
        averages.lerp_(parameters, (1 - decays)[..., None])
    if shadow is not None:
        shadow.copy_(parameters)


def _resnet_shapes(widths: Sequence[int], convolutions: int) -> list[tuple[int, ...]]:
    """The parameters of a ResNet of basic blocks, with `convolutions` in each stage, for 32 by 32 images of 10 classes."""
    shapes, before = [(widths[0], 3, 3, 3), (widths[0],), (widths[0],)], widths[0]
    for width in widths:
        for inputs in (before, *[width] * (convolutions - 1)):
            shapes += [(width, inputs, 3, 3), (width,), (width,)]
        before = width
    return [*shapes, (10, before), (10,)]


RESNET20 = _resnet_shapes((16, 32, 64), convolutions=6)
RESNET18 = _resnet_shapes((64, 128, 256, 512), convolutions=4)
ODD_SHAPES = [(3,), (5, 3, 3, 3), (BLOCK,), (1,), (BLOCK + 1,), (7, 331)]

SPEC = OpSpec(
    op=sgd_update_,
    reference=sgd_update_reference,
    launch=partial(launch_sgd_update, sgd_kernel),
    make=_make,
    exact=_torch_sgd,
    rival=_torch_sgd,
    cases=(
        Case("one-element", {"parameters": [(1,)], "averages": 0, "scaled": False}),
        Case("odd", {"parameters": ODD_SHAPES, "averages": 0, "scaled": False}),
        Case("odd-scaled-1", {"parameters": ODD_SHAPES, "averages": 1, "scaled": True}),
        Case("odd-scaled-4", {"parameters": ODD_SHAPES[::-1], "averages": 4, "scaled": True}),
        Case("resnet20-average", {"parameters": RESNET20, "averages": 1, "scaled": False}, of_a_network=True),
        Case("resnet18", {"parameters": RESNET18, "averages": 0, "scaled": False}, of_a_network=True),
        Case("resnet18-average", {"parameters": RESNET18, "averages": 1, "scaled": False}, of_a_network=True),
    ),
    bytes_moved=lambda given: (
        sum(gradient.nbytes for gradient in given["gradients"])
        + 2 * sum(given[name].nbytes for name in ("parameters", "momenta", "averages") if given[name] is not None)
        + (0 if given["shadow"] is None else given["shadow"].nbytes)
    ),
    summary="SGD with Nesterov momentum, weight decay, moving averages and a low-precision copy of the weights",
    mutates=("parameters", "momenta", "averages", "shadow"),
)
