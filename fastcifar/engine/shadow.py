"""Keeps low-precision copies of convolution and dense weights beside the float32 ones that the optimizer updates.

Autocast casts each weight at every forward pass, and each gradient back: two small kernels a layer on a GPU, where they
cost as much as its smaller convolutions. Here one kernel casts all weights, and one or two take all gradients back;
from the second part of a batch on, one or two more add them up. The values are bitwise the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastcifar.models.blocks import Subsampling
from fastcifar.models.layers import SqueezeExcite


class Shadow:
    """The weights that autocast would cast, as copies in `dtype`; with float32 there are none, and nothing is done.

    The parameters of `model` lie in `flat`, float32 (P,), as `averaging.Buckets` lays them out.
    """

    def __init__(self, model: nn.Module, flat: Tensor, dtype: torch.dtype) -> None:
        self.flat = flat
        cast = {} if dtype == torch.float32 else dict(cast_parameters(model))
        self.originals = list(cast.values())
        self.copies = flat.new_empty(len(flat) if cast else 0, dtype=dtype)
        self.weights: dict[str, Tensor] = {}
        """The copies by parameter name: autograd leaves, for `torch.func.functional_call`."""
        for name, parameter in cast.items():
            part = self.copies.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
            self.weights[name] = part.detach().requires_grad_(parameter.requires_grad)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the current weights; call it before a forward pass."""
        if self.originals:
            self.copies.copy_(self.flat)

    @torch.no_grad()
    def deposit(self) -> None:
        """Adds the copies' gradients to those of the parameters, and drops them; call it after a backward pass."""
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
        for copy in self.weights.values():
            copy.grad = None


def shadow_dtype(arch: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Returns `dtype` where a shadow pays and is safe, else float32.

    A CPU casts within its loops: with two threads a shadow costs 2% of `resnet20_v2`'s speed. Third-party code may read
    a weight outside the layer that owns it.
    """
    return dtype if device.type == "cuda" and ":" not in arch else torch.float32


def cast_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the name and parameter of each plain convolution and dense layer, which autocast casts.

    Other subclasses are left out, as they may compute with a weight before they use it; so is squeeze-and-excitation,
    whose kernel takes float32, and any parameter that several modules share, as others may use it differently.
    """
    users = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    gates = {id(part) for module in model.modules() if isinstance(module, SqueezeExcite) for part in module.modules()}
    for prefix, module in model.named_modules():
        if type(module) in (nn.Conv2d, Subsampling, nn.Linear) and id(module) not in gates:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if users[parameter] == 1:
                    yield name, parameter
