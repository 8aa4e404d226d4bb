"""Layers, parameters, FLOPs and activations of a network, counted by PyTorch itself, for our own without computing
anything.
"""

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
    """One layer that holds parameters."""

    name: str
    kind: str
    output: tuple[int, ...]
    """Shape of what it puts out for one image; () where it is no tensor."""
    parameters: int
    flops: int
    """Forward, for one image; a multiplication and an addition are two."""


@dataclass(frozen=True)
class NetworkCount:
    """A network's sums, and its layers in order."""

    layers: tuple[LayerCount, ...]
    parameters: int
    buffer_bytes: int
    """Running statistics and the like, which are weights too, though no gradient moves them."""
    forward_flops: int
    """For one image."""
    training_flops: int
    """Forward and backward, for one image."""
    activation_bytes: int
    """For one image: what the forward pass keeps for the backward pass, in bfloat16 (see `saved_bytes`)."""


def count_network(arch: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> NetworkCount:
    """The counts of an architecture, as `count_model` has them. Raises as `build_model`."""
    device = torch.device("meta" if arch in ARCHITECTURES else "cpu")
    with torch.random.fork_rng(devices=[]), device:
        return count_model(build_model(arch, classes=classes, image_size=image_size, **options), image_size)


def count_model(model: nn.Module, image_size: int = 32) -> NetworkCount:
    """The counts of a network for images (3, image_size, image_size); convolutions and linear layers carry all FLOPs
    that are counted.

    Two or three images go through it on the device of its parameters, which may be meta. They leave gradients, moved
    running statistics and evaluation mode behind, so give a copy of a network that is still needed.
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
    """A forward hook that notes the shape a layer puts out, of several tensors that of the first."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            outputs[name] = tuple(output.shape[1:])

    return hook


def convolution_backward_flops(
    grad_out: list[int], x: list[int], weight: list[int], *arguments: Any, out_shape: Any = None
) -> int:
    """As many as forward for each gradient asked for, given the shapes; PyTorch's own formula counts groups as if
    they were one.
    """
    *_, transposed, _, _, asked_for = arguments
    return sum(asked_for[:2]) * conv_flop_count(x, weight, grad_out, transposed=transposed)


def own_flops(counts: dict[str, dict[Any, int]], name: str, module: nn.Module) -> int:
    """The FLOPs of a module without those of the modules in it."""
    parts = [f"{name}.{child}" for child, _ in module.named_children()]
    return sum(counts.get(name, {}).values()) - sum(sum(counts.get(part, {}).values()) for part in parts)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd saves in one training pass over `images`, floating-point values counted in bfloat16.

    Each memory counts once, however many operations save it; parameters and buffers do not. The operations are
    PyTorch's own, one by one: what the compiler recomputes is counted. The difference between two batch sizes is free
    of what does not belong to an image.
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
