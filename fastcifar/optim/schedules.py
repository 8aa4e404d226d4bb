"""Learning-rate schedules: pure functions of a run's progress, tabulated once for every step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from fastcifar.errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor of the peak learning rate at `progress`, from 0 (the end of the warm-up) to 1 (the end of the run).

Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
"""


@dataclass(frozen=True)
class Duration:
    """A length of training, written `5ep`, `2000st` or `5%`: epochs, optimiser steps, or a share of the run."""

    amount: float
    unit: str

    @staticmethod
    def parse(text: str) -> Duration:
        """Raises ConfigError where `text` is no duration."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st|%)", text.strip())
        if not match:
            raise ConfigError(f"{text!r} is no duration; write epochs as 5ep, steps as 2000st, or a share of the run as 5%.")
        return Duration(float(match[1]), match[2])

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """The nearest number of whole steps."""
        return round(self.amount * {"ep": steps_per_epoch, "st": 1, "%": total_steps / 100}[self.unit])


def lr_table(schedule: str, peak: float, warmup_steps: int, total_steps: int) -> list[float]:
    """The learning rate of each step: linear from `peak / warmup_steps` to `peak`, then the schedule over what remains.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    if warmup_steps >= total_steps:
        raise ConfigError(f"a warm-up of {warmup_steps} steps fills the whole run of {total_steps}; shorten --warmup or train longer.")
    factor = SCHEDULES[schedule]
    remaining = total_steps - warmup_steps
    rising = [peak * (step + 1) / warmup_steps for step in range(warmup_steps)]
    return rising + [peak * factor(step / remaining) for step in range(remaining)]
