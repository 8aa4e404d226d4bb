"""Sharpness-aware minimisation: takes the gradient at the worst point nearby and applies it to the original weights.

A step is: forward, backward, `Ascend`, forward, backward, `Return`, and then whatever reads the gradient.

Sources: SAM, Foret et al. 2021, arXiv:2010.01412; ASAM, whose neighbourhood is relative to each weight, Kwon et al.
2021, arXiv:2102.11600.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcifar.checks import given
from fastcifar.optim import OptimConfig
from fastcifar.optim.averaging import Buckets


class Ascend:
    """Moves the weights to the worst point nearby by the gradients, which are then dropped.

    With SAM the weights move by `rho * g / |g|`. With ASAM they move by `rho * t**2 * g / |t * g|`, where `t` is `|w| +
    eta` in the parameters named weight and 1 in the others, as in the authors' code. A positive factor of all
    gradients, such as a loss scale, makes no difference. Where the norm is zero or not finite, the weights stay.
    Nothing waits for the device.
    """

    def __init__(self, model: nn.Module, buckets: Buckets, optim: OptimConfig) -> None:
        optim = optim.resolved
        self.rho, self.eta = given(optim.rho), optim.eta
        self.named: list[tuple[str, Tensor]] = list(model.named_parameters())
        self.flat = buckets.flat
        self.kept, self.keep_buffers = buckets.copies(), buckets.keep_buffers
        """Parameters and buffers as they were before the second pass."""

    @torch.no_grad()
    def __call__(self, work: object) -> None:
        torch._foreach_copy_(self.kept, self.flat)
        self.put_back = self.keep_buffers()
        moved = [(name, parameter, parameter.grad) for name, parameter in self.named if parameter.grad is not None]
        parameters, gradients = [parameter for _, parameter, _ in moved], [gradient for *_, gradient in moved]
        weights = [] if self.eta is None else [parameter for name, parameter, _ in moved if "weight" in name]
        extents = torch._foreach_add(torch._foreach_abs(weights), given(self.eta)) if weights else ()
        self.stretch(weights, extents)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.stretch(weights, extents)
        factor = self.rho / norm
        torch._foreach_mul_(gradients, factor)
        torch._foreach_add_(parameters, gradients)
        # The factor of an infinite norm is 0, but 0 times an infinite gradient is NaN.
        sound = norm.isfinite() & factor.isfinite()
        torch.where(sound, self.flat[0], self.kept[0], out=self.flat[0])
        for parameter in parameters:
            parameter.grad = None

    @staticmethod
    def stretch(weights: list[Tensor], extents: tuple[Tensor, ...]) -> None:
        """Multiplies the gradients of `weights` by `extents`; skips an empty list, which foreach kernels refuse."""
        if weights:
            torch._foreach_mul_([given(weight.grad) for weight in weights], extents)


@dataclass(frozen=True)
class Return:
    """Restores the weights, and the running statistics and other buffers of the first pass, to the bit.

    The gradients stay, which are those of the worst point.
    """

    ascend: Ascend

    @torch.no_grad()
    def __call__(self, work: object) -> None:
        self.ascend.put_back()
        torch._foreach_copy_(self.ascend.flat, self.ascend.kept)
