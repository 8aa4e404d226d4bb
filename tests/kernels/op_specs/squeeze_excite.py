"""The declaration of `squeeze_excite`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.kernels.squeeze_excite import squeeze_excite

from .declaration import Arguments, Case, OpSpec


def make(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Makes float32 weights of a size that saturates no gate."""
    *size, reduced = shape["sizes"]
    channels = size[1]

    def activation() -> Tensor:
        return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    return {
        "x": activation(),
        "reduce_weight": torch.randn(reduced, channels, device=device) / channels**0.5,
        "reduce_bias": torch.randn(reduced, device=device) / 2,
        "expand_weight": torch.randn(channels, reduced, device=device) / reduced**0.5,
        "expand_bias": torch.randn(channels, device=device) / 2,
        "residual": activation() if shape["residual"] else None,
        "relu": shape["relu"],
        "skip": shape["skip"],
    }


def usual(
    x: Tensor, residual: Tensor | None, relu: bool, skip: bool, **weights: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    weights = {name: weight.to(x.dtype) for name, weight in weights.items()}
    reduce, expand = weights["reduce_weight"][:, :, None, None], weights["expand_weight"][:, :, None, None]
    hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), reduce, weights["reduce_bias"]))
    y = x * F.conv2d(hidden, expand, weights["expand_bias"]).sigmoid()
    if residual is not None:
        y = y + residual
    y = F.relu(y) if relu else y
    return (y, y) if skip else y


def case(
    sizes: tuple[int, ...], residual: bool = True, relu: bool = True, skip: bool = False, of_a_network: bool = False
) -> Case:
    """Returns a case; `sizes` are N, C, H, W and the hidden units."""
    name = "x".join(map(str, sizes)) + "-residual" * residual + "-relu" * relu + "-skip" * skip
    return Case(name, {"sizes": sizes, "residual": residual, "relu": relu, "skip": skip}, of_a_network)


SPEC = OpSpec(
    op=squeeze_excite,
    make=make,
    rival=usual,
    cases=(
        case((3, 3, 5, 7, 2)),
        case((1, 1, 1, 1, 1), residual=False, relu=False),
        case((3, 17, 8, 8, 5), residual=False),
        case((17, 300, 3, 2, 30), skip=True),
        case((3, 17, 5, 7, 3), relu=False, skip=True),
        case((1, 130, 8, 8, 37), residual=False, skip=True),
        case((3, 1, 5, 7, 37), relu=False),
        case((1, 130, 13, 17, 37), relu=False, skip=True),  # too large for the kernels
        *(
            case((128, c, side, side, c // 16), of_a_network=True)
            for c, side in ((256, 8), (512, 4), (1024, 2), (2048, 1))
        ),
        case((128, 256, 8, 8, 16), skip=True, of_a_network=True),
    ),
    bytes_moved=lambda given: (
        sum(tensor.nbytes for tensor in given.values() if isinstance(tensor, Tensor)) + given["x"].nbytes
    ),
    summary="Squeeze-and-excitation, with the addition of a residual and ReLU where they follow.",
    differentiable=("x", "residual", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias"),
    # The gradients of weights and biases sum few values here, after a dozen roundings each: over random seeds they are
    # no further off than PyTorch's in the median, but in one of twenty cases 2.5 times as far, where it is lucky.
    multiple={torch.float32: 4.0},
    ops=("fastcifar::squeeze_excite", "fastcifar::squeeze_excite_backward"),
)
