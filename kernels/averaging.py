"""Averages of weights along a run, updated in one launch and one pass over memory for a flat bucket of them.

The kernel keeps exponential moving averages of several decays at once. A running mean is one whose decay is n / (n + 1)
after n updates. Integer buffers, such as `num_batches_tracked`, are in no bucket: no average of them has a meaning, and
the caller copies them.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; with exponential weights as
in Tarvainen and Valpola, "Mean teachers are better role models", 2017.
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

# A thread holds four elements: 16 bytes of float32, and one layout for every dtype. With eight of them Triton loads a
# half precision source eight elements wide and moves it through shared memory. Chosen by the compiled code, not by
# timing.
BLOCK = 1024
WARPS = 8

# Elements: with its temporary a piece stays in the second-level cache. Of 2^13 to 2^20, this is the fastest for 11
# million elements (two cores of a Xeon with 2 MB each): 4 ms, against 17 ms in one piece.
CPU_PIECE = 1 << 17


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the vector `tensor`: on a CPU of `CPU_PIECE` elements; elsewhere, or where a compiler fuses
    what follows, one.
    """
    length = tensor.numel()
    size = length if tensor.device.type != "cpu" or is_traced(tensor) else CPU_PIECE
    return (slice(start, start + size) for start in range(0, length, size or 1))


@torch.no_grad()
def ema_update_reference(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """What `ema_update_` computes, in plain torch: each of the three operations rounds to float32."""
    rows, weights = averages.view(decays.numel(), -1).unbind(), (1 - decays).view(-1).unbind()
    for piece in pieces(source):
        new = source[piece]
        for row, weight in zip(rows, weights, strict=True):
            average = row[piece]
            average.add_((new - average).mul_(weight))


@jit
def ema_kernel(averages_ptr, source_ptr, decays_ptr, length, AVERAGES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    source = tl.load(source_ptr + offsets, inside).to(tl.float32)
    for row in tl.static_range(AVERAGES):
        weight = 1 - tl.load(decays_ptr + row)
        average = tl.load(averages_ptr + offsets, inside)
        # Adding zero makes the product round by itself, as in the reference: the bits agree, but for the sign of a
        # zero. A plain product would be fused with the sum, or not, at the pleasure of the Triton version.
        tl.store(averages_ptr + offsets, average + tl.fma(weight, source - average, 0.0), inside)
        averages_ptr += length


@launcher
def launch_ema_update(kernel: Any, averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """Launches `kernel`, which is `ema_kernel` or its wrapped form, over all of `averages`."""
    length, count = source.numel(), int(decays.numel())
    if length:
        kernel[(triton.cdiv(length, BLOCK),)](
            averages, source, decays, length, AVERAGES=count, BLOCK=BLOCK, num_warps=WARPS
        )


@triton_op("fastcifar::ema_update_", mutates_args={"averages"})
def ema_update_(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """Moves averages towards `source` in place: averages += (1 - decay) * (source - averages), in float32.

    The decays stay on the device, so that a schedule can change them without a host sync, a recompile or a new graph
    capture. An average carries no gradient: `source` may require grad, none flows. Fastest where N is a multiple of 16,
    since only then are the kernel's accesses 16 bytes wide.

    Args:
        averages: (N,), or (K, N) for K = 1 to 4 decays, float32, contiguous; does not require grad.
        source: (N,) float32, bfloat16 or float16, contiguous, on the device of `averages`.
        decays: (), or (K,), float32, contiguous, on the device of `averages`; the shares of the old averages that are
        kept.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `averages` requires grad.
    """
    _check(averages, source, decays)
    if use_triton(averages):
        launch_ema_update(wrap_triton(ema_kernel), averages, source, decays)
    else:
        ema_update_reference(averages, source, decays)


def _check(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    if averages.dtype != torch.float32:
        raise TypeError(f"averages must be float32, not {averages.dtype}.")
    if averages.dim() not in (1, 2) or not averages.is_contiguous():
        shape, strides = tuple(averages.shape), averages.stride()
        raise ValueError(f"averages must be contiguous (N,) or (K, N), not of shape {shape} with strides {strides}.")
    if averages.dim() == 2 and not 1 <= len(averages) <= MOST_AVERAGES:
        raise ValueError(f"averages must be of 1 to {MOST_AVERAGES} decays, not {len(averages)}.")
    if averages.requires_grad:
        raise ValueError("averages must not require grad, since they carry no gradient.")
    if decays.dtype != torch.float32:
        raise TypeError(f"decays must be float32, not {decays.dtype}.")
    if source.dtype not in SOURCE_DTYPES:
        raise TypeError(f"source must be float32, bfloat16 or float16, not {source.dtype}.")
    for name, tensor, shape in (("decays", decays, averages.shape[:-1]), ("source", source, averages.shape[-1:])):
        if tensor.shape != shape or not tensor.is_contiguous():
            expected, found, strides = tuple(shape), tuple(tensor.shape), tensor.stride()
            raise ValueError(
                f"{name} must be contiguous of shape {expected}, not of shape {found} with strides {strides}."
            )
        if tensor.device != averages.device:
            raise ValueError(f"{name} must be on {averages.device} like averages, not on {tensor.device}.")


COMPILATIONS = [
    Compilation(
        kernel=ema_kernel,
        signature={
            "averages_ptr": "*fp32:16",
            "source_ptr": f"*{source}:16",
            "decays_ptr": "*fp32:16",
            "length": length,
        },
        constexprs={"AVERAGES": averages, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
    for source, length, averages in (
        ("fp32", "i32:16", 1),
        ("bf16", "i32:16", 1),
        ("fp16", "i32:16", 1),
        ("fp32", "i64", 1),
        ("fp32", "i32:16", MOST_AVERAGES),
        ("bf16", "i32", MOST_AVERAGES),
    )
]


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    decays = torch.tensor([0.99, 0.9, 0.999, 0.5], device=device)
    size, count = shape["size"], shape.get("averages")
    return {
        "averages": torch.randn(size if count is None else (count, size), device=device),
        "source": torch.randn(size, device=device).to(dtype),
        "decays": decays[0] if count is None else decays[:count],
    }


def plain(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """The interpolation of `torch.optim.swa_utils.get_ema_multi_avg_fn`; exact in float64."""
    averages.lerp_(source.to(averages.dtype), (1 - decays)[..., None])


NETWORKS = {"resnet20": 272_496, "resnet_prop": 11_174_016, "wrn28_10": 36_479_232}
"""About as many parameters as they have, in a bucket."""

SPEC = OpSpec(
    op=ema_update_,
    reference=ema_update_reference,
    launch=partial(launch_ema_update, ema_kernel),
    make=make,
    exact=plain,
    rival=plain,
    cases=(
        *(Case(f"{size}", {"size": size}) for size in (1, 127, BLOCK + 1)),
        *(Case(f"{count}x1025", {"size": 1025, "averages": count}) for count in (1, MOST_AVERAGES)),
        *(Case(name, {"size": size}, of_a_network=True) for name, size in NETWORKS.items()),
        Case("resnet_prop-3", {"size": NETWORKS["resnet_prop"], "averages": 3}, of_a_network=True),
    ),
    bytes_moved=lambda arguments: 2 * arguments["averages"].nbytes + arguments["source"].nbytes,
    summary="exponential moving averages of a flat bucket, of several decays at once",
    mutates=("averages",),
)
