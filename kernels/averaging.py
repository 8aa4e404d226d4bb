"""Averages of weights along a run, updated in one launch and one pass over memory for a flat bucket of them.

The kernel keeps exponential moving averages of several decays at once. A running mean is one whose decay is n / (n + 1)
after n updates. Integer buffers, such as `num_batches_tracked`, are in no bucket: no average of them has a meaning, and
the caller copies them.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; with exponential weights as
in Tarvainen and Valpola, "Mean teachers are better role models", 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .checks import check_float, check_tensor, described
from .dispatch import is_traced, jit, launch, tl, triton, use_triton

MOST_AVERAGES = 4

# A thread holds four elements: 16 bytes of float32, and one layout for every dtype. With eight of them Triton loads a
# half precision source eight elements wide and moves it through shared memory. Chosen by the compiled code, not by
# timing.
BLOCK = 1024
WARPS = 8

# Elements: with its temporary a piece stays in the second-level cache. Of 2^13 to 2^20, this is the fastest for 11
# million elements (two cores of a Xeon with 2 MB each): 4 ms, against 17 ms in one piece.
CPU_PIECE = 1 << 17


@jit
def ema_kernel(averages_ptr, source_ptr, decays_ptr, length, AVERAGES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    source = tl.load(source_ptr + offsets, inside).to(tl.float32)
    for row in tl.static_range(AVERAGES):  # pyright: ignore[reportGeneralTypeIssues]
        weight = 1 - tl.load(decays_ptr + row)
        average = tl.load(averages_ptr + offsets, inside)
        # Adding zero rounds the product by itself, as in the reference: the bits agree, but for the sign of a zero.
        # Whether a plain product is fused with the sum depends on the Triton version.
        tl.store(averages_ptr + offsets, average + tl.fma(weight, source - average, 0.0), inside)
        averages_ptr += length


@triton_op("fastcifar::ema_update_", mutates_args={"averages"})
def ema_update_(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """Moves averages towards `source` in place: averages += (1 - decay) * (source - averages), in float32.

    The decays stay on the device, so that a schedule can change them without a host sync, a recompile or a new graph
    capture. An average carries no gradient: `source` may require grad, none flows. Fastest where N is a multiple of 16,
    since only then are the kernel's accesses 16 bytes wide.

    Args:
        averages: (N,), or (K, N) for K = 1 to 4 decays, float32, contiguous; does not require grad.
        source: (N,) float32, bfloat16 or float16, contiguous, on the device of `averages`.
        decays: (), or (K,), float32, contiguous, on the device of `averages`; the kept shares of the old averages.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `averages` requires grad.
    """
    check(averages, source, decays)
    length = source.numel()
    if use_triton(averages):
        sizes = {"AVERAGES": int(decays.numel()), "BLOCK": BLOCK, "num_warps": WARPS}
        if length:
            launch(wrap_triton(ema_kernel), (triton.cdiv(length, BLOCK),), averages, source, decays, length, **sizes)
        return
    rows, weights = averages.view(decays.numel(), -1).unbind(), (1 - decays).view(-1).unbind()
    # A CPU goes over pieces, but not where a compiler fuses the three operations, each of which rounds to float32.
    size = CPU_PIECE if source.device.type == "cpu" and not is_traced(source) else max(length, 1)
    for start in range(0, length, size):
        new = source[start : start + size]
        for row, weight in zip(rows, weights, strict=True):
            average = row[start : start + size]
            average.add_((new - average).mul_(weight))


def check(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    check_tensor("averages", averages, torch.float32, averages.shape, averages.device)
    if averages.dim() not in (1, 2):
        raise ValueError(f"averages must be (N,) or (K, N), not {described(averages)}.")
    if averages.dim() == 2 and not 1 <= len(averages) <= MOST_AVERAGES:
        raise ValueError(f"averages must be of 1 to {MOST_AVERAGES} decays, not {len(averages)}.")
    if averages.requires_grad:
        raise ValueError("averages must not require grad, since they carry no gradient.")
    check_tensor("decays", decays, torch.float32, averages.shape[:-1], averages.device)
    check_float("source", source)
    check_tensor("source", source, source.dtype, averages.shape[-1:], averages.device)
