"""SGD whose momentum changes from step to step, as the one-cycle schedule has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastcifar.optim.schedules import HIGHEST_MOMENTUM


class CycledSGD(torch.optim.SGD):
    """Torch's SGD, whose momentum in a step is each group's `cycled`, a number or a float32 tensor ().

    Torch's kernel takes its momentum as a number, which a CUDA graph would repeat for ever. So the kernel's stays the
    same, the buffers are scaled before it, and Nesterov's look ahead is corrected after it. Nothing waits for the
    device, even under a gradient scaler, on whose overflow all of it is skipped.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, momentum=HIGHEST_MOMENTUM, **settings)
        for group in self.param_groups:
            group["cycled"] = HIGHEST_MOMENTUM
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves every parameter that has a gradient."""
        moved = [[parameter for parameter in g["params"] if parameter.grad is not None] for g in self.param_groups]
        groups = [
            (group, parameters, [self.state[parameter]["momentum_buffer"] for parameter in parameters])
            for group, parameters in zip(self.param_groups, moved, strict=True)
            if parameters
        ]
        for group, _, buffers in groups:
            torch._foreach_mul_(buffers, self.unless_overflowed(group["cycled"] / HIGHEST_MOMENTUM, 1.0))
        super().step()
        for group, parameters, buffers in groups:
            if group["nesterov"]:
                excess = group["lr"] * (HIGHEST_MOMENTUM - group["cycled"])
                torch._foreach_add_(parameters, torch._foreach_mul(buffers, self.unless_overflowed(excess, 0.0)))

    def unless_overflowed(self, value: float | Tensor, otherwise: float) -> float | Tensor:
        overflowed = getattr(self, "found_inf", None)
        return value if overflowed is None else torch.where(overflowed.bool(), otherwise, value)
