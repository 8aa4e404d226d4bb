"""Mixup and CutMix: an image and its label blended with those of a partner."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.augment.sampling import Mixing
from fastcifar.kernels.transfer import upload

SHARES = 256
"""The denominator of shares, so that bytes are blended in integers, equally on every device."""


def mix_images(images: Tensor, partners: Tensor, mixing: Mixing) -> Tensor:
    """Blends or pastes two batches (N, 3, H, W) of one dtype in channels_last; the result has the same form."""
    device = images.device
    if mixing.box is not None:
        top, left, bottom, right = (upload(edge, device)[:, None, None, None] for edge in mixing.box.unbind(1))
        row = torch.arange(images.shape[2], device=device)[:, None]
        column = torch.arange(images.shape[3], device=device)
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        return torch.where(inside, partners, images)
    share = upload(mixing.share, device)[:, None, None, None]
    if images.dtype == torch.uint8:
        share = share.to(torch.int32)
        return ((images * share + partners * (SHARES - share) + SHARES // 2) >> 8).to(torch.uint8)
    return (partners.float() + (images.float() - partners.float()) * (share.float() / SHARES)).to(images.dtype)


def mix_labels(labels: Tensor, partners: Tensor, mixing: Mixing, classes: int) -> Tensor:
    """Mixes labels, int64 (N,) each -> float32 (N, classes); each row sums to 1."""
    share = (upload(mixing.share, labels.device).float() / SHARES)[:, None]
    every = torch.arange(classes, device=labels.device)
    return (labels[:, None] == every) * share + (partners[:, None] == every) * (1 - share)
