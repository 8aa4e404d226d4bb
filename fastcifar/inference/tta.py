"""Test-time augmentation: the mean of the logits of several views of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.inference import TTA

PASSES: dict[TTA, int] = {"none": 1, "mirror": 2, "mirror-shift": 6}
"""Forward passes of each, which is what it costs."""


def logits_of_views(model: nn.Module, images: Tensor, tta: TTA) -> Tensor:
    """Images (N, 3, H, W), normalised -> logits, float32 (N, classes).

    "mirror" is the mean over an image and its mirror image. "mirror-shift" gives half the weight to that, and half to
    the same of the image moved by a pixel, down and right, and up and left, over a border of reflected pixels; as
    airbench's `infer_mirror_translate` has it (Jordan 2024, arXiv:2404.00498, multi-crop evaluation).
    """
    if tta == "none":
        return model(images).float()
    if tta == "mirror":
        return (model(images).float() + model(mirrored(images)).float()) / 2
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, shift : shift + height, shift : shift + width] for shift in (0, 2)]
    shifted = torch.stack(
        [logits_of_views(model, view.contiguous(memory_format=torch.channels_last), "mirror") for view in moved]
    )
    return (logits_of_views(model, images, "mirror") + shifted.mean(0)) / 2


def mirrored(images: Tensor) -> Tensor:
    return images.flip(3).contiguous(memory_format=torch.channels_last)
