"""The declaration of `batch_norm_relu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.kernels.batch_norm import Skip, batch_norm_relu

from .declaration import Arguments, Case, OpSpec


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    size, channels = shape["size"], shape["size"][1]

    def activation(scale: float, mean: float) -> Tensor:
        return torch.randn(size, device=device).mul_(scale).add_(mean).to(dtype, memory_format=torch.channels_last)

    x, weight = activation(2.0, 0.5), torch.rand(channels, device=device) + 0.5
    bias = torch.randn(channels, device=device) * 0.3
    residual = activation(1.0, 0.0) if shape.get("residual") else None
    addend = activation(1.0, 0.0) if shape.get("addend") else None
    # Where the ReLU is given almost zero, rounding decides whether a gradient passes: none of millions of elements may
    # be so.
    total = x if addend is None else x + addend
    z = F.batch_norm(total.float(), None, None, weight, bias, training=True)
    z = z if residual is None else z + residual
    return {
        "x": torch.where(z.abs() < 1 / 64, x + 0.125, x).contiguous(memory_format=torch.channels_last),
        "weight": weight,
        "bias": bias,
        "running_mean": torch.randn(channels, device=device),
        "running_var": torch.rand(channels, device=device) + 0.5,
        "residual": residual,
        "addend": addend,
        "relu": shape.get("relu", True),
        "skip": shape.get("skip"),
    }


def norm_then_relu(x, residual, addend, relu: bool = True, skip: Skip | None = None, **norm: Tensor) -> Any:
    x = x if addend is None else x + addend
    y = F.batch_norm(x, training=True, **norm)
    y = y if residual is None else y + residual
    y = F.relu(y) if relu else y
    return y if skip is None else (y, x if skip == "input" else y)


def bytes_moved(arguments: Arguments) -> int:
    x, residual, addend, weight = (arguments[name] for name in ("x", "residual", "addend", "weight"))
    # The output is as large as x, as is the sum. Four vectors are read, and the running statistics written.
    return (2 + (residual is not None) + 2 * (addend is not None)) * x.nbytes + 6 * weight.nbytes


def case(size: tuple[int, int, int, int], of_a_network: bool = False, **how: Any) -> Case:
    named = {"residual": "-residual", "relu": "-linear", "addend": "-addend", "skip": f"-{how.get('skip')}"}
    return Case("x".join(map(str, size)) + "".join(map(named.get, how)), {"size": size, **how}, of_a_network)


INTO_A_BLOCK: dict[str, Any] = {"addend": True, "skip": "input"}
"""The variant in a pre-activation block, which takes its input from the one before."""
OUT_OF_A_BLOCK: dict[str, Any] = {"residual": True, "skip": "output"}
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"residual": True}, INTO_A_BLOCK, OUT_OF_A_BLOCK)
ODD_SIZES = [(1, 3, 5, 7), (7, 5, 1, 1), (1, 17, 33, 1), (3, 130, 5, 7), (2, 1, 3, 3)]
IN_TWO_LAUNCHES = (5, 16, 33, 5)
NETWORK_SIZES = [
    (128, c, s, s) for c, s in ((64, 8), (16, 32), (32, 16), (64, 32), (128, 16), (256, 8), (512, 4), (1024, 2))
]

SPEC = OpSpec(
    op=batch_norm_relu,
    make=make,
    rival=norm_then_relu,
    cases=(
        *(case(size, **VARIANTS[place % 4]) for place, size in enumerate(ODD_SIZES, 1)),
        *(case(IN_TWO_LAUNCHES, **how) for how in VARIANTS),
        case((3, 17, 5, 7), residual=True, addend=True),
        *(case((3, 17, 5, 7), relu=False, **how) for how in VARIANTS),
        case((3, 17, 5, 7), relu=False, residual=True, skip="input"),
        case((3, 17, 5, 7), relu=False, skip="output"),
        *(case(NETWORK_SIZES[0], of_a_network=True, **how) for how in VARIANTS),
        *(case(size, of_a_network=True, **VARIANTS[place % 4]) for place, size in enumerate(NETWORK_SIZES[1:])),
        case(NETWORK_SIZES[-1], of_a_network=True, **OUT_OF_A_BLOCK),
    ),
    bytes_moved=bytes_moved,
    summary="Batch norm for training, with the additions before and after it and the ReLU, where they are.",
    mutates=("running_mean", "running_var"),
    differentiable=("x", "addend", "residual", "weight", "bias"),
    ops=("fastcifar::batch_norm_relu_forward", "fastcifar::batch_norm_relu_backward"),
)
