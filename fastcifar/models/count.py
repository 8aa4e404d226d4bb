"""Counts layers, parameters, FLOPs and activations by PyTorch's means; our own networks are not computed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fastcifar.models import ARCHITECTURES, build_model

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class LayerCount:
    """A layer with parameters."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Output shape for one image; () where the output is no tensor."""
    parameters: int
    flops: int
    """Forward FLOPs for one image; a multiplication and an addition are two."""


@dataclass(frozen=True)
class NetworkCount:
    """The totals of a network, and its layers in order."""

    layers: tuple[LayerCount, ...]
    parameters: int
    buffer_bytes: int
    """Bytes of running statistics and other weights without a gradient."""
    forward_flops: int
    """FLOPs of a forward pass, for one image."""
    training_flops: int
    """Forward and backward FLOPs for one image."""
    activation_bytes: int
    """Bytes that the forward pass keeps for the backward pass of one image, in bfloat16 (see `saved_bytes`)."""


def count_network(arch: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> NetworkCount:
    """Counts an architecture as `count_model` does. Raises as `build_model`."""
    device = torch.device("meta" if arch in ARCHITECTURES else "cpu")
    with torch.random.fork_rng(devices=[]), device:
        return count_model(build_model(arch, classes=classes, image_size=image_size, **options), image_size)


def count_model(model: nn.Module, image_size: int = 32) -> NetworkCount:
    """Counts a network for images (3, image_size, image_size); only convolutions and linear layers count as FLOPs.

    Two or three images pass through it on the device of its parameters, which may be meta. They leave gradients,
    changed running statistics and evaluation mode behind, so pass a copy of a network that is still needed.
    """
    parameters = list(model.parameters())
    with torch.random.fork_rng(devices=[]):
        images = torch.zeros(3, 3, image_size, image_size, device=parameters[0].device)
        activation_bytes = saved_bytes(model, images) - saved_bytes(model, images[1:].clone())
        outputs: dict[str, tuple[int, ...]] = {}
        hooks = [module.register_forward_hook(remember(name, outputs)) for name, module in model.named_modules()]
        model.eval()
        with FlopCounterMode(display=False) as forward:
            logits = model(images[:1])
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
        ) as backward:
            logits.sum().backward()
    for hook in hooks:
        hook.remove()
    layers = tuple(
        LayerCount(
            name=name,
            kind=type(module).__name__,
            output=outputs.get(name, ()),
            parameters=sum(parameter.numel() for parameter in module.parameters(recurse=False)),
            flops=own_flops(forward.get_flop_counts(), f"{type(model).__name__}.{name}".rstrip("."), module),
        )
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    )
    total = forward.get_total_flops()
    return NetworkCount(
        layers,
        parameters=sum(parameter.numel() for parameter in parameters),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        forward_flops=total,
        training_flops=total + backward.get_total_flops(),
        activation_bytes=activation_bytes,
    )


def remember(name: str, outputs: dict[str, tuple[int, ...]]) -> Callable[..., None]:
    """A forward hook that records the shape of a layer's output, of its first tensor if there are several."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            outputs[name] = tuple(output.shape[1:])

    return hook


def convolution_backward_flops(
    grad_out: list[int], x: list[int], weight: list[int], *arguments: Any, out_shape: Any = None
) -> int:
    """Counts the FLOPs of the forward pass for each gradient requested; PyTorch's own formula ignores groups."""
    *_, transposed, _, _, asked_for = arguments
    return sum(asked_for[:2]) * conv_flop_count(x, weight, grad_out, transposed=transposed)


def own_flops(counts: dict[str, dict[Any, int]], name: str, module: nn.Module) -> int:
    """The FLOPs of a module without its children."""
    parts = [f"{name}.{child}" for child, _ in module.named_children()]
    return sum(counts.get(name, {}).values()) - sum(sum(counts.get(part, {}).values()) for part in parts)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd saves in a training pass over `images`, floating-point values counted in bfloat16.

    Each memory counts once, however many operations save it; parameters and buffers do not count. Operations are
    PyTorch's eager ones, so values that a compiler would recompute are counted. The difference between two batch sizes
    leaves out what does not belong to an image.
    """
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = BFLOAT16_BYTES if tensor.is_floating_point() else tensor.element_size()
        kept[storage._cdata] = (storage, storage.nbytes() // tensor.element_size() * size)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(images)
    del logits
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for key, (_, size) in kept.items() if key not in own)
