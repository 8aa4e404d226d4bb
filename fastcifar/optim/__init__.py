"""Optimisers and schedules by name; the maps are torch-free, so that a wrong name or setting is refused before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastcifar.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    """Where an optimiser is built, and what trains well with it at batch size 128."""

    target: str
    """`module:function`."""
    lr: float
    weight_decay: float
    momentum: float | None = None
    """None where it has none."""

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.momentum is None else ("momentum",)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("fastcifar.optim.optimizers:sgd", lr=0.1, weight_decay=5e-4, momentum=0.9),
    "sgd-nesterov": Optimizer("fastcifar.optim.optimizers:sgd_nesterov", lr=0.1, weight_decay=5e-4, momentum=0.9),
}

SHARPNESS: dict[str, tuple[str, ...]] = {"none": (), "sam": ("rho",), "asam": ("rho", "eta")}
"""What each kind of sharpness-aware minimisation reads."""


def check_reads(name: str, given: Mapping[str, Any], reads: Collection[str], kind: str) -> None:
    """Raises ConfigError where a setting was `given` (is not None) that `name` does not read."""
    for setting, value in given.items():
        if value is not None and setting not in reads:
            known = f"it reads {', '.join(reads)}" if reads else "leave it out"
            raise ConfigError(f"the {kind} {name} does not read {setting}; {known}.")
