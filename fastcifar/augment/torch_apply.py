"""The reference applier: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Params


def shift_and_flip(images: Tensor, params: Params) -> Tensor:
    """uint8 (N, H, W, C) -> the same shape, shifted over black and mirrored as `params` says.

    A shifted row is one run of bytes in the padded images, so the crop is a selection of rows; it runs at the speed of a copy.
    """
    count, height, width, channels = images.shape
    device = images.device
    shift = params.shift.to(device, non_blocking=True)
    margin = int(params.shift.abs().max()) if count else 0
    if margin:
        padded = F.pad(images, (0, 0, margin, margin, margin, margin))
        line, stride = torch.arange(count, device=device)[:, None], width + 2 * margin
        y = line * (height + 2 * margin) + shift[:, :1] + margin + torch.arange(height, device=device)
        start = (y * stride + shift[:, 1:] + margin) * channels
        runs = padded.as_strided((padded.numel() - width * channels + 1, width * channels), (1, 1))
        images = runs.index_select(0, start.flatten()).view(count, height, width, channels)
    mirrored = params.flip.nonzero()[:, 0].to(device, non_blocking=True)
    return images.index_copy(0, mirrored, images.index_select(0, mirrored).flip(2)) if len(mirrored) else images


class TorchApplier:
    """Carries out `Params` with torch operators on the images' own device and stream.

    Args:
        shape: height and width of the images.
        chunk_size: most images in one call; unused here.
        dtype: of the images given back; uint8 leaves them unnormalised.
        normalization: applied for every other dtype.
        device: where the images are; unused here.
    """

    def __init__(
        self, shape: tuple[int, int], chunk_size: int, dtype: torch.dtype, normalization: Normalization, device: torch.device
    ) -> None:
        self.dtype, self.normalization = dtype, normalization
        self.pending: Tensor | None = None

    def submit(self, images: Tensor, params: Params) -> None:
        """Start on a chunk: uint8 (N, H, W, 3) and its parameters."""
        self.pending = self.normalization(shift_and_flip(images, params), self.dtype)

    def collect(self) -> Tensor:
        """The chunk submitted last: (N, 3, H, W) in channels_last."""
        result, self.pending = self.pending, None
        assert result is not None, "collect() without submit()"
        return result
