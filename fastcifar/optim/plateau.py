"""The factor of a learning rate that falls where the loss does not; free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastcifar.checks import check_range
from fastcifar.errors import ConfigError

THRESHOLD, LEAST_CHANGE = 1e-4, 1e-8
"""The relative fall for a loss to count as better, and the least change of the factor: torch's defaults."""


@dataclass
class Plateau:
    """Lowers the learning rate after `patience` epochs without a better loss, as torch's `ReduceLROnPlateau`.

    Args:
        gamma: what the rate is multiplied by.
        patience: epochs without improvement that are borne.
        final_lr: share of the peak below which the rate does not fall.
    """

    gamma: float = 0.1
    patience: int = 10
    final_lr: float = 0.0
    factor: float = 1.0
    best: float = math.inf
    bad_epochs: int = 0

    def observe(self, loss: float) -> float:
        """Records the loss of an epoch; returns the factor for the rest of the table."""
        better = loss < self.best * (1.0 - THRESHOLD)
        self.best, self.bad_epochs = (loss, 0) if better else (self.best, self.bad_epochs + 1)
        if self.bad_epochs > self.patience:
            reduced, self.bad_epochs = max(self.factor * self.gamma, self.final_lr), 0
            self.factor = reduced if self.factor - reduced > LEAST_CHANGE else self.factor
        return self.factor

    def state(self) -> dict[str, float]:
        """The state as plain numbers; `best` is infinite before the first epoch."""
        return {"factor": self.factor, "best": self.best, "bad_epochs": float(self.bad_epochs)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes over a `state`. Raises ConfigError where it holds no numbers that a plateau can have."""
        check_range("factor", state["factor"], 0, 1)
        check_range("bad_epochs", state["bad_epochs"], 0, self.patience)
        if math.isnan(state["best"]):
            raise ConfigError("best is nan; expected a number.")
        self.factor, self.best, self.bad_epochs = state["factor"], state["best"], int(state["bad_epochs"])
