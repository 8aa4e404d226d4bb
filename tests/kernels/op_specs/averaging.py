"""The declaration of `ema_update_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcifar.kernels.averaging import BLOCK, MOST_AVERAGES, ema_update_

from .declaration import Arguments, Case, OpSpec

NETWORKS = {"resnet20": 272_496, "resnet_prop": 11_174_016, "wrn28_10": 36_479_232}
"""About as many parameters in a bucket as these networks have."""


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    decays = torch.tensor([0.99, 0.9, 0.999, 0.5], device=device)
    size, count = shape["size"], shape.get("averages")
    return {
        "averages": torch.randn(size if count is None else (count, size), device=device),
        "source": torch.randn(size, device=device).to(dtype),
        "decays": decays[0] if count is None else decays[:count],
    }


def interpolation(averages: Tensor, source: Tensor, decays: Tensor) -> None:
    """Averages as `torch.optim.swa_utils.get_ema_multi_avg_fn` does."""
    averages.lerp_(source.to(averages.dtype), (1 - decays)[..., None])


SPEC = OpSpec(
    op=ema_update_,
    make=make,
    rival=interpolation,
    cases=(
        *(Case(f"{size}", {"size": size}) for size in (1, 127, BLOCK + 1, 0)),
        *(Case(f"{count}x1025", {"size": 1025, "averages": count}) for count in (1, MOST_AVERAGES)),
        *(Case(name, {"size": size}, of_a_network=True) for name, size in NETWORKS.items()),
        Case("resnet_prop-3", {"size": NETWORKS["resnet_prop"], "averages": 3}, of_a_network=True),
    ),
    bytes_moved=lambda arguments: 2 * arguments["averages"].nbytes + arguments["source"].nbytes,
    summary="Exponential moving averages of a flat bucket, of several decays at once.",
    mutates=("averages",),
    same_bits=True,
)
