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

    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (N, H, W, 3) -> `dtype` (N, 3, H, W) in channels_last, computed in float32; for uint8 the bytes as they are.

        Scale and offset are laid out for a whole row: over an innermost dimension of three, the CPU's loops are four times slower.
        """
        if dtype == torch.uint8:
            return images.permute(0, 3, 1, 2)
        count, height, width, channels = images.shape
        scale = images.new_tensor([1 / (255 * std) for std in self.std], dtype=torch.float32).repeat(width)
        offset = images.new_tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], dtype=torch.float32).repeat(width)
        rows = images.reshape(count, height, width * channels)
        normalized = rows.to(torch.float32).mul_(scale).add_(offset).to(dtype)
        return normalized.view(count, height, width, channels).permute(0, 3, 1, 2)
