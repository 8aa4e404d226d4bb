"""What a device can do by itself, as opposed to by emulation, and how it is fed."""

from __future__ import annotations

import torch
from torch import Tensor

OLDEST_BF16 = (8, 0)
"""Compute capability from which on an NVIDIA card multiplies bfloat16."""


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware (emulation, which torch also calls support, does not count)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= OLDEST_BF16
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A GPU copies it from pinned memory, behind the host's back; for any other memory the
    host may have to wait.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
