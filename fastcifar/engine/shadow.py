"""Weights of convolutions and dense layers in the precision they are used in, beside the float32 ones that the
optimizer moves.

Autocast casts each weight at every forward pass, and each gradient back: two small kernels a layer on a GPU, where they
cost as much as its smaller convolutions. Here one kernel casts all weights, and one or two take all gradients back;
from the second part of a batch on, one or two more add them up. The values are the same to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastcifar.models.layers import SqueezeExcite


class Shadow:
    """The weights that autocast would cast, cast.

    Args:
        model: the network, with its parameters in `flat`.
        flat: float32 (P,), as `averaging.Buckets` lays it out.
        dtype: of the copies; with float32 there are none, and nothing is done.
    """

    def __init__(self, model: nn.Module, flat: Tensor, dtype: torch.dtype) -> None:
        self.flat = flat
        cast = {} if dtype == torch.float32 else dict(cast_parameters(model))
        self.originals = list(cast.values())
        self.copies = flat.new_empty(len(flat) if cast else 0, dtype=dtype)
        self.weights: dict[str, Tensor] = {}
        """By the names of the parameters: leaves of autograd, for `torch.func.functional_call`."""
        for name, parameter in cast.items():
            part = self.copies.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
            self.weights[name] = part.detach().requires_grad_(parameter.requires_grad)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the weights as they are now; due before a forward pass."""
        if self.originals:
            self.copies.copy_(self.flat)

    @torch.no_grad()
    def deposit(self) -> None:
        """Adds the gradients to those of the parameters, and drops them; due after a backward pass."""
        copies = zip(self.originals, self.weights.values(), strict=True)
        pairs = [(original, copy.grad) for original, copy in copies if copy.grad is not None]
        if not pairs:
            return
        originals, found = map(list, zip(*pairs, strict=True))
        gradients = [torch.empty_like(original) for original in originals]
        torch._foreach_copy_(gradients, found)  # pyright: ignore[reportPrivateImportUsage] (torch has no public one)
        begun = [(o.grad, gradient) for o, gradient in zip(originals, gradients, strict=True) if o.grad is not None]
        if begun:
            torch._foreach_add_(*map(list, zip(*begun, strict=True)))  # pyright: ignore[reportPrivateImportUsage]
        for original, gradient in zip(originals, gradients, strict=True):
            original.grad = gradient if original.grad is None else original.grad
        self.drop()

    def drop(self) -> None:
        """Forgets the gradients."""
        for copy in self.weights.values():
            copy.grad = None


def shadow_dtype(arch: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """`dtype` where a shadow pays and is safe, else float32.

    A CPU casts within its loops, and two threads lose 2% of `resnet20_v2`'s speed by a shadow. Code from elsewhere may
    read a weight outside of the layer that owns it.
    """
    return dtype if device.type == "cuda" and ":" not in arch else torch.float32


def cast_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of what autocast casts: those of plain convolutions and dense layers.

    Not of their subclasses, which may compute with a weight before they use it, nor within squeeze-and-excitation,
    whose kernel takes float32. A parameter that other modules share stays as it is, for these may use it otherwise.
    """
    users = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    gates = {id(part) for module in model.modules() if isinstance(module, SqueezeExcite) for part in module.modules()}
    for prefix, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear) and id(module) not in gates:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if users[parameter] == 1:
                    yield name, parameter
