"""From bytes to what a network reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """`(image / 255 - mean) / std`, a channel at a time; `mean` and `std` are fractions of 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same as `byte * scale + offset`: float32 (3,) each, on `device`."""
        scale = torch.tensor([1 / (255 * std) for std in self.std], device=device)
        return scale, torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=device)
