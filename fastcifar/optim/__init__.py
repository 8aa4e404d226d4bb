"""Optimisers and schedules by name; the maps are torch-free, so that a wrong name or setting is refused before torch
is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastcifar.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    """What an optimiser is, and what trains well with it at batch size 128."""

    target: str
    """`module:class`, of a `torch.optim.Optimizer`."""
    lr: float
    weight_decay: float
    momentum: float | None = None
    """None where it has none."""
    nesterov: bool = False
    """Whether the gradient is taken as if after the step of the momentum; without momentum there is no difference."""
    form: Literal["fused", "foreach", "own"] = "fused"
    """One kernel for all parameters, one for each operation, or neither, in an optimiser that is not torch's."""

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.momentum is None else ("momentum",)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("torch.optim:SGD", lr=0.1, weight_decay=5e-4, momentum=0.9),
    "sgd-nesterov": Optimizer("torch.optim:SGD", lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=True),
    "adam": Optimizer("torch.optim:Adam", lr=3e-3, weight_decay=1e-4),
    "adamw": Optimizer("torch.optim:AdamW", lr=3e-3, weight_decay=5e-2),
    "radam": Optimizer("torch.optim:RAdam", lr=1e-2, weight_decay=1e-4, form="foreach"),
    "rmsprop": Optimizer("torch.optim:RMSprop", lr=1e-3, weight_decay=1e-4, momentum=0.0, form="foreach"),
    "adagrad": Optimizer("torch.optim:Adagrad", lr=1e-2, weight_decay=1e-4),
    "adadelta": Optimizer("torch.optim:Adadelta", lr=1.0, weight_decay=1e-4, form="foreach"),
    "muon": Optimizer("fastcifar.optim.muon:Muon", lr=0.1, weight_decay=1e-2, momentum=0.9, form="own"),
}
"""The learning rates are the best of a grid (factors of 2 to 3) for a small pre-activation ResNet, 10,000 images and
three epochs; the decays are customary.
"""

SHARPNESS: dict[str, tuple[str, ...]] = {"none": (), "sam": ("rho",), "asam": ("rho", "eta")}
"""What each kind of sharpness-aware minimisation reads."""


def check_reads(name: str, given: Mapping[str, Any], reads: Collection[str], kind: str) -> None:
    """Raises ConfigError where a setting was `given` (is not None) that `name` does not read."""
    for setting, value in given.items():
        if value is not None and setting not in reads:
            known = f"it reads {', '.join(reads)}" if reads else "leave it out"
            raise ConfigError(f"the {kind} {name} does not read {setting}; {known}.")
