"""The end of a training step on a GPU, in one launch of one program.

It updates the sums of the epoch, the number of the next step, its learning rates and its decays. All of it stays on the
device, so that nothing waits for the host and a captured step reads its own values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .dispatch import jit, launch, tl, use_triton

NEVER = float(2**53)
"""Stands in the place of a step's number where there was no such step."""


def set_rates_and_decays(
    step: Tensor, rates: Tensor, decays: Tensor, lr_table: Tensor, ratios: Tensor, decay_table: Tensor
) -> None:
    """Fills `rates` and `decays` for `step`, or the last step of the tables, without waiting for its value."""
    place = step.clamp(max=len(lr_table) - 1)
    torch.mul(lr_table.index_select(0, place), ratios, out=rates)
    decays.copy_(decay_table.index_select(0, place)[0])


@jit
def advance_kernel(
    sums_ptr,
    step_ptr,
    rates_ptr,
    decays_ptr,
    loss_ptr,
    correct_ptr,
    lr_table_ptr,
    ratios_ptr,
    decay_table_ptr,
    images,
    last,
    RATES: tl.constexpr,
    DECAYS: tl.constexpr,
    NEVER: tl.constexpr,
):
    step, loss = tl.load(step_ptr), tl.load(loss_ptr)
    finite = loss - loss == 0
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.where(finite, loss, 0.0).to(tl.float64) * images)
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + tl.load(correct_ptr).to(tl.float64))
    tl.store(sums_ptr + 2, tl.minimum(tl.load(sums_ptr + 2), tl.where(finite, NEVER, step.to(tl.float64))))
    tl.store(step_ptr, step + 1)
    place = tl.minimum(step + 1, last)
    lr = tl.load(lr_table_ptr + place)
    for i in tl.static_range(RATES):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(rates_ptr + i, lr * tl.load(ratios_ptr + i))
    for i in tl.static_range(DECAYS):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(decays_ptr + i, tl.load(decay_table_ptr + place * DECAYS + i))


@triton_op("fastcifar::advance_", mutates_args={"sums", "step", "rates", "decays"})
def advance_(
    sums: Tensor,
    step: Tensor,
    rates: Tensor,
    decays: Tensor,
    loss: Tensor,
    correct: Tensor,
    lr_table: Tensor,
    ratios: Tensor,
    decay_table: Tensor,
    images: int,
) -> None:
    """Adds a step to the sums of its epoch, counts it, and sets rates and decays for the next step.

    All tensors are on one device.

    Args:
        sums: float64 (3,), the loss times the images of each step where it is finite, the right answers, and the first
            step whose loss is not finite, or `NEVER`.
        step: int64 (1,), the number of this step; one higher afterwards.
        rates: float32 (G,), the learning rates of the groups of parameters: the table's rate times `ratios`.
        decays: float32 (K,), the decays of the averages, and the momentum where a schedule changes it.
        loss: float32 (), the mean over the images.
        correct: int64 (), the number of right answers.
        lr_table: float32 (S,), the rate of each step; after the last step its rate stays.
        ratios: float32 (G,).
        decay_table: float32 (S, K), the `decays` of each step.
        images: the number of images in the step.
    """
    if use_triton(sums):
        written, read = (sums, step, rates, decays), (loss, correct, lr_table, ratios, decay_table)
        sizes = {"RATES": len(rates), "DECAYS": len(decays), "NEVER": NEVER, "num_warps": 1}
        launch(wrap_triton(advance_kernel), (1,), *written, *read, images, len(lr_table) - 1, **sizes)
        return
    finite = loss.isfinite()
    sums[0].add_(torch.where(finite, loss, 0.0), alpha=images)
    sums[1].add_(correct)
    sums[2].copy_(torch.minimum(sums[2], torch.where(finite, NEVER, step[0].double())))
    step.add_(1)
    set_rates_and_decays(step, rates, decays, lr_table, ratios, decay_table)
