"""Converts bytes to the input of a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcifar.kernels.augment import normalize_reference


@dataclass(frozen=True)
class Normalization:
    """`(image / 255 - mean) / std` for each channel; `mean` and `std` are fractions of 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The normalisation as `byte * scale + offset`: float32 (3,) each, on `device`."""
        scale = torch.tensor([1 / (255 * std) for std in self.std], device=device)
        return scale, torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=device)


class Normalizer:
    """`normalization` on `device` as the first layer of a network; a compiler fuses it with the next layer."""

    def __init__(self, normalization: Normalization, device: torch.device) -> None:
        self.scale, self.offset = normalization.affine(device)

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalises uint8 (N, 3, H, W) to the same shape in `dtype`; both are channels_last."""
        return normalize_reference(images.permute(0, 2, 3, 1), self.scale, self.offset, dtype).permute(0, 3, 1, 2)
