"""Averages of weights along a run, updated in one launch and one pass over memory for a flat bucket of them.

Exponential moving averages of several decays at once, and the running mean of stochastic weight averaging. Counters live on the device
and advance in the same launch, so that nothing waits for the host and a captured graph goes on counting. Integer buffers, such as
`num_batches_tracked`, are in no bucket: no average of them has a meaning, and the caller copies them.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; with exponential weights as in Tarvainen and
Valpola, "Mean teachers are better role models", 2017; the running mean as in Izmailov et al., "Averaging weights leads to wider optima
and better generalization", 2018. The warm-up of the decay is TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .compilation import Compilation
from .dispatch import is_traced, jit, launcher, tl, triton, use_triton
from .spec import Arguments, Case, OpSpec

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_AVERAGES = 4

# A thread holds four elements: 16 bytes of float32, and one layout for every dtype. With eight of them Triton loads a half precision
# source eight elements wide and moves it through shared memory. Chosen by the compiled code, not by timing.
BLOCK = 1024
WARPS = 8

# Elements: with its temporary a piece stays in the second-level cache. Of 2^13 to 2^20, this is the fastest for 11 million elements (two
# cores of a Xeon with 2 MB each): 4 ms, against 17 ms in one piece.
CPU_PIECE = 1 << 17


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the vector `tensor`: on a CPU of `CPU_PIECE` elements; elsewhere, or where a compiler fuses what follows, one."""
    length = tensor.numel()
    size = length if tensor.device.type != "cpu" or is_traced(tensor) else CPU_PIECE
    return (slice(start, start + size) for start in range(0, length, size or 1))


@torch.no_grad()
def ema_update_reference(averages: Tensor, source: Tensor, decays: Tensor, step: Tensor | None = None) -> None:
    """What `ema_update_`, or `ema_warm_up_`, computes, in plain torch: each of the three operations rounds to float32."""
    if step is not None:
        decays = torch.minimum(decays, (1 + step).float() / (10 + step).float())
        step.add_(1)
    rows, weights = averages.view(decays.numel(), -1).unbind(), (1 - decays).view(-1).unbind()
    for piece in pieces(source):
        new = source[piece]
        for row, weight in zip(rows, weights, strict=True):
            average = row[piece]
            average.add_((new - average).mul_(weight))


@torch.no_grad()
def swa_update_reference(average: Tensor, source: Tensor, count: Tensor) -> None:
    """What `swa_update_` computes, in plain torch."""
    first, weight = count == 0, (count + 1).float().reciprocal()
    for piece in pieces(source):
        old, new = average[piece], source[piece]
        old.copy_(torch.where(first, new, (new - old).mul_(weight).add_(old)))
    count.add_(1)


@jit
def move_kernel(average, source, weight):
    """average + weight * (source - average).

    Adding zero makes the product round by itself, as in the reference: the bits agree, but for the sign of a zero. A plain product would be
    fused with the sum, or not, at the pleasure of the Triton version.
    """
    return average + tl.fma(weight, source - average, 0.0)


@jit
def advance_kernel(counter_ptr):
    """What a counter held before this launch, which leaves it one higher.

    No program may see it advanced by another. So each counts itself in the upper half as it reads the lower one, and the last restores
    the plain number.
    """
    seen = tl.atomic_add(counter_ptr, 1 << 32, sem="relaxed")
    count = seen & 0xFFFFFFFF
    if (seen >> 32) == tl.num_programs(0) - 1:
        tl.store(counter_ptr, count + 1)
    return count


@jit
def ema_kernel(
    averages_ptr,
    source_ptr,
    decays_ptr,
    step_ptr,
    length,
    AVERAGES: tl.constexpr,
    WARM_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    source = tl.load(source_ptr + offsets, inside).to(tl.float32)
    if WARM_UP:
        step = advance_kernel(step_ptr)
        most = tl.div_rn((1 + step).to(tl.float32), (10 + step).to(tl.float32))
    for row in tl.static_range(AVERAGES):
        decay = tl.load(decays_ptr + row)
        if WARM_UP:
            decay = tl.minimum(decay, most)
        average = tl.load(averages_ptr + offsets, inside)
        tl.store(averages_ptr + offsets, move_kernel(average, source, 1 - decay), inside)
        averages_ptr += length


@jit
def swa_kernel(average_ptr, source_ptr, count_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    source = tl.load(source_ptr + offsets, inside).to(tl.float32)
    average = tl.load(average_ptr + offsets, inside)
    count = advance_kernel(count_ptr)
    weight = tl.div_rn(1.0, (count + 1).to(tl.float32))
    tl.store(average_ptr + offsets, tl.where(count == 0, source, move_kernel(average, source, weight)), inside)


@launcher
def launch_ema_update(kernel: Any, averages: Tensor, source: Tensor, decays: Tensor, step: Tensor | None = None) -> None:
    """Launches `kernel`, which is `ema_kernel` or its wrapped form, over all of `averages`."""
    length = source.numel()
    # An absent tensor needs some pointer, which is not read; an empty bucket needs a program, which counts.
    kernel[(max(triton.cdiv(length, BLOCK), 1),)](
        averages,
        source,
        decays,
        decays if step is None else step,
        length,
        AVERAGES=int(decays.numel()),
        WARM_UP=step is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@launcher
def launch_swa_update(kernel: Any, average: Tensor, source: Tensor, count: Tensor) -> None:
    """Launches `kernel`, which is `swa_kernel` or its wrapped form, over all of `average`."""
    length = source.numel()
    kernel[(max(triton.cdiv(length, BLOCK), 1),)](average, source, count, length, BLOCK=BLOCK, num_warps=WARPS)


@triton_op("fastcifar::ema_update_", mutates_args={"averages"})
def ema_update_(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """Moves averages towards `source` in place: averages += (1 - decay) * (source - averages), in float32.

    The decays stay on the device, so that a schedule can change them without a host sync, a recompile or a new graph capture. An average
    carries no gradient: `source` may require grad, none flows. Fastest where N is a multiple of 16, since only then are the kernel's
    accesses 16 bytes wide.

    Args:
        averages: (N,), or (K, N) for K = 1 to 4 decays, float32, contiguous; does not require grad.
        source: (N,) float32, bfloat16 or float16, contiguous, on the device of `averages`.
        decays: (), or (K,), float32, contiguous, on the device of `averages`; the shares of the old averages that are kept.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `averages` requires grad.
    """
    check_averages(averages, decays)
    _check_source(source, averages.shape[-1:], "averages", averages)
    if use_triton(averages):
        launch_ema_update(wrap_triton(ema_kernel), averages, source, decays)
    else:
        ema_update_reference(averages, source, decays)


# An op of its own: torch 2.11 fails where an optional argument that is written in place is left out.
@triton_op("fastcifar::ema_warm_up_", mutates_args={"averages", "step"})
def ema_warm_up_(averages: Tensor, source: Tensor, decays: Tensor, step: Tensor) -> None:
    """`ema_update_` with each decay no more than (1 + step) / (10 + step), so that the start is soon forgotten; then step += 1.

    Args:
        averages: as for `ema_update_`.
        source: as for `ema_update_`.
        decays: as for `ema_update_`; reached once warmed up.
        step: () int64, on the device of `averages`, below 2^32; the number of updates so far. Each bucket needs its own.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `averages` requires grad.
    """
    check_averages(averages, decays)
    _check_source(source, averages.shape[-1:], "averages", averages)
    _check_counter("step", step, "averages", averages)
    if use_triton(averages):
        launch_ema_update(wrap_triton(ema_kernel), averages, source, decays, step)
    else:
        ema_update_reference(averages, source, decays, step)


@triton_op("fastcifar::swa_update_", mutates_args={"average", "count"})
def swa_update_(average: Tensor, source: Tensor, count: Tensor) -> None:
    """Takes one more vector into a running mean, in place: average += (source - average) / (count + 1), in float32; then count += 1.

    The first takes the place of whatever `average` holds. The mean carries no gradient: `source` may require grad, none flows.

    Args:
        average: (N,) float32, contiguous; does not require grad.
        source: (N,) float32, bfloat16 or float16, contiguous, on the device of `average`.
        count: () int64, on the device of `average`, below 2^32; how many vectors `average` is the mean of. Each bucket needs its own.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `average` requires grad.
    """
    _check_average("average", average, dims=(1,))
    _check_source(source, average.shape, "average", average)
    _check_counter("count", count, "average", average)
    if use_triton(average):
        launch_swa_update(wrap_triton(swa_kernel), average, source, count)
    else:
        swa_update_reference(average, source, count)


def check_averages(averages: Tensor, decays: Tensor) -> None:
    """Raises where averages and their decays are not what `ema_update_` says."""
    _check_average("averages", averages, dims=(1, 2))
    if averages.dim() == 2 and not 1 <= len(averages) <= MOST_AVERAGES:
        raise ValueError(f"averages must be of 1 to {MOST_AVERAGES} decays, not {len(averages)}.")
    if decays.dtype != torch.float32:
        raise TypeError(f"decays must be float32, not {decays.dtype}.")
    _check_place("decays", decays, averages.shape[:-1], "averages", averages)


def _check_average(name: str, average: Tensor, dims: tuple[int, ...]) -> None:
    if average.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {average.dtype}.")
    if average.dim() not in dims or not average.is_contiguous():
        shape = " or ".join(("(N,)", "(K, N)")[: len(dims)])
        raise ValueError(f"{name} must be contiguous {shape}, not of shape {tuple(average.shape)} with strides {average.stride()}.")
    if average.requires_grad:
        raise ValueError(f"{name} must not require grad, since averages carry no gradient.")


def _check_source(source: Tensor, shape: torch.Size, owner: str, average: Tensor) -> None:
    if source.dtype not in SOURCE_DTYPES:
        raise TypeError(f"source must be float32, bfloat16 or float16, not {source.dtype}.")
    _check_place("source", source, shape, owner, average)


def _check_counter(name: str, counter: Tensor, owner: str, average: Tensor) -> None:
    if counter.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {counter.dtype}.")
    _check_place(name, counter, torch.Size(), owner, average)


def _check_place(name: str, tensor: Tensor, shape: torch.Size, owner: str, average: Tensor) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        expected, strides = tuple(shape), tensor.stride()
        raise ValueError(f"{name} must be contiguous of shape {expected}, not of shape {tuple(tensor.shape)} with strides {strides}.")
    if tensor.device != average.device:
        raise ValueError(f"{name} must be on {average.device} like {owner}, not on {tensor.device}.")


COMPILATIONS = [
    Compilation(
        kernel=ema_kernel,
        signature={
            "averages_ptr": "*fp32:16",
            "source_ptr": f"*{source}:16",
            "decays_ptr": "*fp32:16",
            "step_ptr": "*i64:16" if warm_up else "*fp32:16",
            "length": length,
        },
        constexprs={"AVERAGES": averages, "WARM_UP": warm_up, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
    for source, length, averages, warm_up in (
        ("fp32", "i32:16", 1, False),
        ("bf16", "i32:16", 1, False),
        ("fp16", "i32:16", 1, False),
        ("fp32", "i64", 1, False),
        ("fp32", "i32:16", 1, True),
        ("fp32", "i32:16", MOST_AVERAGES, True),
        ("bf16", "i32", MOST_AVERAGES, True),
    )
] + [
    Compilation(
        kernel=swa_kernel,
        signature={"average_ptr": "*fp32:16", "source_ptr": f"*{source}:16", "count_ptr": "*i64:16", "length": length},
        constexprs={"BLOCK": BLOCK},
        num_warps=WARPS,
    )
    for source, length in (("fp32", "i32:16"), ("bf16", "i32:16"), ("fp16", "i32:16"), ("fp32", "i64"))
]


def _make_ema(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    decays = torch.tensor([0.99, 0.9, 0.999, 0.5], device=device)
    size, count = shape["size"], shape.get("averages")
    step = {"step": torch.tensor(shape["step"], device=device)} if "step" in shape else {}
    return {
        "averages": torch.randn(size if count is None else (count, size), device=device),
        "source": torch.randn(size, device=device).to(dtype),
        "decays": decays[0] if count is None else decays[:count],
        **step,
    }


def _torch_ema(averages: Tensor, source: Tensor, decays: Tensor, step: Tensor | None = None) -> None:
    """The interpolation of `torch.optim.swa_utils.get_ema_multi_avg_fn`; exact in float64."""
    if step is not None:
        decays = torch.minimum(decays, (1 + step).to(decays.dtype) / (10 + step))
        step.add_(1)
    averages.lerp_(source.to(averages.dtype), (1 - decays)[..., None])


def _ema_bytes(arguments: Arguments) -> int:
    return 2 * arguments["averages"].nbytes + arguments["source"].nbytes


def _make_swa(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    return {
        "average": torch.randn(shape["size"], device=device),
        "source": torch.randn(shape["size"], device=device).to(dtype),
        "count": torch.tensor(shape["count"], device=device),
    }


def _torch_swa(average: Tensor, source: Tensor, count: Tensor) -> None:
    """The interpolation of `torch.optim.swa_utils.get_swa_multi_avg_fn`; exact in float64."""
    average.lerp_(source.to(average.dtype), 1 / (count + 1).to(average.dtype))
    count.add_(1)


NETWORKS = {"resnet20": 272_496, "resnet_prop": 11_174_016, "wrn28_10": 36_479_232}
"""About as many parameters as they have, in a bucket."""

SPECS = (
    OpSpec(
        op=ema_update_,
        reference=ema_update_reference,
        launch=partial(launch_ema_update, ema_kernel),
        make=_make_ema,
        exact=_torch_ema,
        rival=_torch_ema,
        cases=(
            *(Case(f"{size}", {"size": size}) for size in (1, 127, BLOCK - 1, BLOCK + 1, 4099)),
            *(Case(f"{count}x1025", {"size": 1025, "averages": count}) for count in range(1, MOST_AVERAGES + 1)),
            *(Case(name, {"size": size}, of_a_network=True) for name, size in NETWORKS.items()),
            Case("resnet_prop-3", {"size": NETWORKS["resnet_prop"], "averages": 3}, of_a_network=True),
        ),
        bytes_moved=_ema_bytes,
        summary="exponential moving averages of a flat bucket, of several decays at once",
        mutates=("averages",),
    ),
    OpSpec(
        op=ema_warm_up_,
        reference=ema_update_reference,
        launch=partial(launch_ema_update, ema_kernel),
        make=_make_ema,
        exact=_torch_ema,
        rival=_torch_ema,
        cases=(
            Case("1025", {"size": 1025, "step": 0}),
            *(Case(f"{count}x1025", {"size": 1025, "averages": count, "step": 7 * count}) for count in range(1, MOST_AVERAGES + 1)),
            *(Case(name, {"size": size, "averages": 1, "step": 7}, of_a_network=True) for name, size in NETWORKS.items()),
        ),
        bytes_moved=_ema_bytes,
        summary="the same, warmed up from a step that is counted on the device",
        mutates=("averages", "step"),
    ),
    OpSpec(
        op=swa_update_,
        reference=swa_update_reference,
        launch=partial(launch_swa_update, swa_kernel),
        make=_make_swa,
        exact=_torch_swa,
        rival=_torch_swa,
        cases=(
            *(Case(f"{size}-after-{count}", {"size": size, "count": count}) for size in (1, 127, BLOCK + 1, 4099) for count in (0, 1, 6)),
            *(Case(name, {"size": size, "count": 6}, of_a_network=True) for name, size in NETWORKS.items()),
        ),
        bytes_moved=lambda arguments: 2 * arguments["average"].nbytes + arguments["source"].nbytes,
        summary="running mean of a flat bucket (stochastic weight averaging), counted on the device",
        mutates=("average", "count"),
    ),
)
