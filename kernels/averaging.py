"""Exponential moving averages of weights, updated in one launch and one pass over memory for a flat bucket of them.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; with exponential weights as in Tarvainen and
Valpola, "Mean teachers are better role models", 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .compilation import Compilation
from .dispatch import jit, tl, triton, use_triton

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A thread of the default four warps holds four elements: 16 bytes of float32, and one layout for every dtype. At 1024 Triton loads a half
# precision source eight elements wide and moves it through shared memory. Chosen by the compiled code, not by timing.
BLOCK = 512


@torch.no_grad()
def ema_update_reference(average: Tensor, source: Tensor, decay: Tensor) -> None:
    """What `ema_update_` computes, in plain torch: each of the three operations rounds to float32."""
    average.add_((source - average).mul_(1 - decay))


@jit
def ema_kernel(average_ptr, source_ptr, decay_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < length
    average = tl.load(average_ptr + offsets, inside)
    difference = tl.load(source_ptr + offsets, inside).to(tl.float32) - average
    # Adding zero makes the product round by itself, as in the reference: the bits agree, but for the sign of a zero. A plain product
    # would be fused with the sum, or not, at the pleasure of the Triton version.
    step = tl.fma(1 - tl.load(decay_ptr), difference, 0.0)
    tl.store(average_ptr + offsets, average + step, inside)


COMPILATIONS = [
    Compilation(
        kernel=ema_kernel,
        signature={"average_ptr": "*fp32:16", "source_ptr": f"*{source}:16", "decay_ptr": "*fp32:16", "length": length},
        constexprs={"BLOCK": BLOCK},
    )
    for source, length in (("fp32", "i32:16"), ("bf16", "i32:16"), ("fp16", "i32:16"), ("fp32", "i64"))
]


def launch_ema_update(kernel: Any, average: Tensor, source: Tensor, decay: Tensor) -> None:
    """Launches `kernel`, which is `ema_kernel` or its wrapped form, over all of `average`."""
    length = average.numel()
    kernel[(triton.cdiv(length, BLOCK),)](average, source, decay, length, BLOCK=BLOCK)


@triton_op("fastcifar::ema_update_", mutates_args={"average"})
def ema_update_(average: Tensor, source: Tensor, decay: Tensor) -> None:
    """Moves `average` towards `source` in place: average += (1 - decay) * (source - average), in float32.

    `decay` stays on the device, so that a schedule can change it without a host sync, a recompile or a new graph capture. An average
    carries no gradient: `source` may require grad, none flows. Fastest where N is a multiple of 16, since only then are the kernel's
    accesses 16 bytes wide.

    Args:
        average: (N,) float32, contiguous; does not require grad.
        source: (N,) float32, bfloat16 or float16, contiguous, on the device of `average`.
        decay: () float32, on the device of `average`; the share of the old average that is kept.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, strides or device, or `average` requires grad.
    """
    _check(average, source, decay)
    if use_triton(average):
        launch_ema_update(wrap_triton(ema_kernel), average, source, decay)
    else:
        ema_update_reference(average, source, decay)


def _check(average: Tensor, source: Tensor, decay: Tensor) -> None:
    if average.dtype != torch.float32:
        raise TypeError(f"average must be float32, not {average.dtype}.")
    if source.dtype not in SOURCE_DTYPES:
        raise TypeError(f"source must be float32, bfloat16 or float16, not {source.dtype}.")
    if decay.dtype != torch.float32:
        raise TypeError(f"decay must be float32, not {decay.dtype}.")
    if average.dim() != 1 or not average.is_contiguous():
        raise ValueError(f"average must be a contiguous vector, not of shape {tuple(average.shape)} with strides {average.stride()}.")
    if source.shape != average.shape or not source.is_contiguous():
        shape = tuple(average.shape)
        raise ValueError(f"source must be contiguous of shape {shape}, not of shape {tuple(source.shape)} with strides {source.stride()}.")
    if decay.dim() != 0:
        raise ValueError(f"decay must be a scalar tensor of shape (), not of shape {tuple(decay.shape)}.")
    for name, tensor in (("source", source), ("decay", decay)):
        if tensor.device != average.device:
            raise ValueError(f"{name} must be on {average.device} like average, not on {tensor.device}.")
    if average.requires_grad:
        raise ValueError("average must not require grad, since averages carry no gradient.")
