"""Mixup and CutMix: an image and its label blended with those of a partner."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcifar.augment.sampling import Mixing
from fastcifar.kernels.transfer import upload

SHARES = 256
"""Shares are of 256, so that bytes are blended in integers, alike on every device."""


def mix_images(images: Tensor, partners: Tensor, mixing: Mixing) -> Tensor:
    """(N, 3, H, W) twice, of one dtype, in channels_last -> the same, blended or pasted."""
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
    """int64 (N,) twice -> float32 (N, classes), each row with a sum of 1."""
    share = (upload(mixing.share, labels.device).float() / SHARES)[:, None]
    every = torch.arange(classes, device=labels.device)
    return (labels[:, None] == every) * share + (partners[:, None] == every) * (1 - share)
