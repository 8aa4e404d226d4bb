"""The declaration of `advance_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcifar.kernels.bookkeeping import NEVER, advance_

from .declaration import Arguments, Case, OpSpec


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Makes arguments for `rates`, `decays`, `step`, `steps` and a loss that may be infinite."""
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


def definition(step: Tensor, loss: Tensor, lr_table: Tensor, ratios: Tensor, images: int, **others: Tensor) -> None:
    """Computes each number by itself, without waiting for one, so that a GPU's graph can hold it."""
    sums, rates, decays = others["sums"], others["rates"], others["decays"]
    sums[0] += loss.nan_to_num(0, 0, 0).double() * images
    sums[1] += others["correct"]
    sums[2:] = torch.where(loss.isfinite(), sums[2:], sums[2:].clamp(max=step.double()))
    step += 1
    following = step.clamp(max=len(lr_table) - 1)
    rates[:] = lr_table[following] * ratios
    decays[:] = others["decay_table"][following][0]


def case(name: str, *, of_a_network: bool = False, **shape: float) -> Case:
    return Case(name, {"rates": 1, "decays": 1, "step": 3, "steps": 7, **shape}, of_a_network)


SPEC = OpSpec(
    op=advance_,
    make=make,
    rival=definition,
    cases=(
        case("one-rate"),
        case("four-rates-no-average", rates=4, decays=0),
        case("four-averages-last-step", decays=4, step=6),
        case("infinite", loss=float("inf")),
        case("infinite-in-the-first-step", loss=float("-inf"), step=0),
        case("a-run", steps=78_000, step=3_900, of_a_network=True),
    ),
    bytes_moved=lambda given: 2 * 24 + 2 * 8 + 4 * (3 * len(given["rates"]) + 2 * len(given["decays"]) + 2) + 8,
    summary="The end of a step: sums of the epoch, number, learning rates and decays of the next step.",
    dtypes=(torch.float32,),
    mutates=("sums", "step", "rates", "decays"),
    same_bits=True,
)
