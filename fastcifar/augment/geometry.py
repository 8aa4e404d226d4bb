"""Crop, mirror, rotation, translation and shear as one map for each sample, from output to input pixels.

Maps are composed in float64 on the CPU and then fixed to 16 fractional bits, the arithmetic in which PIL resamples
(`affine_fixed` in its Geometry.c). From there on every backend computes in integers, so that they agree with PIL and
with each other to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcifar.kernels.warp import ONE


@dataclass(frozen=True)
class Resampling:
    """How a warp reads pixels of the input."""

    bilinear: bool = False
    """Bilinear interpolation instead of the nearest pixel."""
    fill: str = "constant"
    """Pixels beyond the border: constant, one colour; reflect, mirrored about the edge; clamp, the nearest edge pixel.
    """
    colour: tuple[int, int, int] = (0, 0, 0)
    """The colour of the constant fill, 0 to 255."""


def identity(count: int) -> Tensor:
    """Identity maps, float64 (N, 3, 3). Coordinates are (x, y, 1), in pixels from the upper left corner."""
    return torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Reads from (x, y) pixels further right and down: float64 (N,) each -> (N, 3, 3)."""
    matrix = identity(len(x))
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def mirror(flip: Tensor, width: int) -> Tensor:
    """Mirrors left to right where `flip`, bool (N,), is true."""
    matrix = identity(len(flip))
    matrix[:, 0, 0] = torch.where(flip, -1.0, 1.0)
    matrix[:, 0, 2] = torch.where(flip, float(width), 0.0)
    return matrix


def rotation(degrees: Tensor, centre: tuple[float, float]) -> Tensor:
    """Rotates counter-clockwise about `centre`, as `PIL.Image.rotate` does: float64 (N,) -> (N, 3, 3).

    PIL rounds the four factors to 15 decimals, which makes quarter turns exact.
    """
    angle = -degrees * torch.pi / 180
    cosine, sine = torch.round(angle.cos(), decimals=15), torch.round(angle.sin(), decimals=15)
    matrix = identity(len(degrees))
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine, sine
    matrix[:, 1, 0], matrix[:, 1, 1] = -sine, cosine
    x, y = centre
    matrix[:, 0, 2] = x - cosine * x - sine * y
    matrix[:, 1, 2] = y + sine * x - cosine * y
    return matrix


def shear(x: Tensor, y: Tensor, centre: tuple[float, float]) -> Tensor:
    """Shears about `centre`: (N,) each -> (N, 3, 3).

    Reads `x` pixels further right for each pixel below the centre, and `y` further down for each to its right.
    """
    matrix = identity(len(x))
    matrix[:, 0, 1], matrix[:, 1, 0] = x, y
    matrix[:, 0, 2], matrix[:, 1, 2] = -x * centre[1], -y * centre[0]
    return matrix


def fixed_point(matrix: Tensor) -> Tensor:
    """Fixed-point coefficients of maps, as by PIL's `FIX`: float64 (N, 3, 3) -> int32 (N, 6), a b c d e f.

    The output pixel in column i and row j is read at ((a i + b j + c) >> 16, (d i + e j + f) >> 16), so the half pixel
    to its centre is part of c and f.
    """
    top = matrix[:, :2].clone()
    top[:, :, 2] += 0.5 * (top[:, :, 0] + top[:, :, 1])
    return torch.floor(top * ONE + 0.5).to(torch.int32).flatten(1)
