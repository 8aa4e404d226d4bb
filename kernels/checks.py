"""Checks of ops' arguments, so that no kernel reads or writes foreign memory; every error names the argument.

Each raises TypeError where the argument has the wrong dtype, and ValueError where it has the wrong shape, strides or
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}.")


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}.")
    if tensor.shape != torch.Size(shape) or not tensor.is_contiguous(memory_format=layout):
        expected = f"contiguous{', channels last,' if layout == torch.channels_last else ''} of shape {tuple(shape)}"
        raise ValueError(f"{name} must be {expected}, not {described(tensor)}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}.")


def check_activation(name: str, tensor: Tensor) -> None:
    """Checks for (N, C, H, W) in a float type, channels last; only N may be 0."""
    check_float(name, tensor)
    if tensor.dim() != 4 or 0 in tensor.shape[1:] or not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} must be (N, C, H, W), channels last, not {described(tensor)}.")


def check_like(name: str, tensor: Tensor | None, activation: Tensor) -> None:
    """Checks that `tensor`, unless it is None, is like an activation."""
    if tensor is not None:
        check_tensor(name, tensor, activation.dtype, activation.shape, activation.device, torch.channels_last)


def described(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
