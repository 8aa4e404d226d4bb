"""Layers, parameters and FLOPs of a network, counted by PyTorch's own counter without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastcifar.models import build_model


@dataclass(frozen=True)
class LayerCount:
    """One layer that holds parameters."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Shape of what it puts out for one image."""
    parameters: int
    flops: int
    """Forward, for one image; a multiplication and an addition are two."""


@dataclass(frozen=True)
class NetworkCount:
    layers: tuple[LayerCount, ...]
    parameters: int
    forward_flops: int
    """For one image."""
    training_flops: int
    """Forward and backward, for one image."""


def count_network(arch: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> NetworkCount:
    """The counts of an architecture; convolutions and linear layers carry all FLOPs that are counted. Raises as `build_model`."""
    with torch.device("meta"):
        model = build_model(arch, classes=classes, image_size=image_size, **options)
        image = torch.empty(1, 3, image_size, image_size)
    outputs: dict[str, tuple[int, ...]] = {}
    hooks = [module.register_forward_hook(remember(name, outputs)) for name, module in model.named_modules()]
    model.eval()
    with FlopCounterMode(display=False) as forward:
        logits = model(image)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    for hook in hooks:
        hook.remove()
    by_module = forward.get_flop_counts()
    layers = tuple(
        LayerCount(
            name=name,
            kind=type(module).__name__,
            output=outputs[name],
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            flops=sum(by_module.get(f"{type(model).__name__}.{name}", {}).values()),
        )
        for name, module in model.named_modules()
        if not list(module.children()) and list(module.parameters())
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = forward.get_total_flops()
    return NetworkCount(layers, parameters, total, total + backward.get_total_flops())


def remember(name: str, outputs: dict[str, tuple[int, ...]]):
    """A forward hook that notes the shape a layer puts out."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = tuple(output.shape[1:])

    return hook
