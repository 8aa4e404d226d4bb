"""The end of a training step on a GPU, in one launch of one program: the sums of the epoch, the number of the next
step, its learning rates and its decays. All of it stays on the device, so that nothing waits for the host and a
captured step reads what is due to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .compilation import Compilation
from .dispatch import jit, launcher, tl, use_triton
from .spec import Arguments, Case, OpSpec

NEVER = float(2**53)
"""In the place of a step's number: there was none."""


@torch.no_grad()
def advance_reference(
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
    """What `advance_` computes, in plain torch."""
    finite = loss.isfinite()
    sums[0].add_(torch.where(finite, loss, 0.0), alpha=images)
    sums[1].add_(correct)
    sums[2].copy_(torch.minimum(sums[2], torch.where(finite, NEVER, step[0].double())))
    step.add_(1)
    set_rates_and_decays(step, rates, decays, lr_table, ratios, decay_table)


@torch.no_grad()
def set_rates_and_decays(
    step: Tensor, rates: Tensor, decays: Tensor, lr_table: Tensor, ratios: Tensor, decay_table: Tensor
) -> None:
    """Fills `rates` and `decays` with what is due at `step`, or at the last step of the tables, without waiting for
    its value.
    """
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
    for i in tl.static_range(RATES):
        tl.store(rates_ptr + i, lr * tl.load(ratios_ptr + i))
    for i in tl.static_range(DECAYS):
        tl.store(decays_ptr + i, tl.load(decay_table_ptr + place * DECAYS + i))


@launcher
def launch_advance(kernel: Any, *tensors: Tensor, images: int) -> None:
    """Launches `kernel`, which is `advance_kernel` or its wrapped form, on the tensors that `advance_` takes, in
    their order.
    """
    rates, decays, lr_table = tensors[2], tensors[3], tensors[6]
    kernel[(1,)](*tensors, images, len(lr_table) - 1, RATES=len(rates), DECAYS=len(decays), NEVER=NEVER, num_warps=1)


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
    """Takes a step into the sums of its epoch, counts it, and sets rates and decays to those of the next step; all on
    one device.

    Args:
        sums: float64 (3,): the loss times the images of each step where it is finite, the right answers, and the first
        step where it is
            not, `NEVER` where there is none.
        step: int64 (1,), the number of this step; one higher afterwards.
        rates: float32 (G,), the learning rates of the groups of parameters: that of the table times `ratios`.
        decays: float32 (K,), of the K averages.
        loss: float32 (), the mean over the images.
        correct: int64 (), the right answers.
        lr_table: float32 (S,), of each step; after the last step its rate stays.
        ratios: float32 (G,).
        decay_table: float32 (S, K).
        images: of the step.
    """
    if use_triton(sums):
        launch_advance(
            wrap_triton(advance_kernel),
            sums,
            step,
            rates,
            decays,
            loss,
            correct,
            lr_table,
            ratios,
            decay_table,
            images=images,
        )
    else:
        advance_reference(sums, step, rates, decays, loss, correct, lr_table, ratios, decay_table, images)


IN_FLOAT64, IN_INT64 = ("sums",), ("step", "correct")
TENSORS = ("sums", "step", "rates", "decays", "loss", "correct", "lr_table", "ratios", "decay_table")

COMPILATIONS = [
    Compilation(
        kernel=advance_kernel,
        signature={
            **{
                f"{name}_ptr": "*fp64:16" if name in IN_FLOAT64 else "*i64:16" if name in IN_INT64 else "*fp32:16"
                for name in TENSORS
            },
            "images": "i32:16",
            "last": "i32",
        },
        constexprs={"RATES": rates, "DECAYS": decays, "NEVER": NEVER},
        num_warps=1,
    )
    for rates, decays in ((1, 1), (4, 4))
]


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Arguments for `rates`, `decays`, `step`, `steps` and a loss that may be infinite."""
    count, averages, steps = shape["rates"], shape["decays"], shape["steps"]
    return {
        "sums": torch.tensor([17.0, 5.0, NEVER], dtype=torch.float64, device=device),
        "step": torch.tensor([shape["step"]], device=device),
        "rates": torch.rand(count, device=device),
        "decays": torch.rand(averages, device=device),
        "loss": torch.tensor(shape.get("loss", 2.3), device=device),
        "correct": torch.tensor(13, device=device),
        "lr_table": torch.rand(steps, device=device),
        "ratios": torch.rand(count, device=device),
        "decay_table": torch.rand(steps, averages, device=device),
        "images": 128,
    }


def plain(
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
    """The definition, number by number."""
    number = step.item()
    sums[1] += correct
    if loss.isfinite():
        sums[0] += loss.double() * images
    else:
        sums[2] = min(sums[2].item(), number)
    step += 1
    following = min(number + 1, len(lr_table) - 1)
    rates[:] = lr_table[following] * ratios
    decays[:] = decay_table[following]


def _case(name: str, *, of_a_network: bool = False, **shape: float) -> Case:
    return Case(name, {"rates": 1, "decays": 1, "step": 3, "steps": 7, **shape}, of_a_network)


SPEC = OpSpec(
    op=advance_,
    reference=advance_reference,
    launch=lambda images, **tensors: launch_advance(
        advance_kernel, *(tensors[name] for name in TENSORS), images=images
    ),
    make=make,
    exact=plain,
    rival=advance_reference,
    cases=(
        _case("one-rate"),
        _case("four-rates-no-average", rates=4, decays=0),
        _case("four-averages-last-step", decays=4, step=6),
        _case("infinite", loss=float("inf")),
        _case("infinite-in-the-first-step", loss=float("-inf"), step=0),
        _case("a-run", steps=78_000, step=3_900, of_a_network=True),
    ),
    bytes_moved=lambda given: 2 * 24 + 2 * 8 + 4 * (3 * len(given["rates"]) + 2 * len(given["decays"]) + 2) + 8,
    summary="The end of a step: sums of the epoch, number, learning rates and decays of the next step.",
    dtypes=(torch.float32,),
    mutates=("sums", "step", "rates", "decays"),
)
