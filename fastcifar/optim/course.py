"""Lengths of training, and the time of a schedule in a run; free of torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fastcifar.errors import ConfigError

AUTO, WARMUP_SHARE, SHORTEST_WARMUP, LONGEST_WARMUP_SHARE = "auto", 0.05, 200, 0.25
"""The default warm-up: a share of the run, but at least so many steps, up to the larger share of the run.

A share alone takes a short run to its peak within a few steps, too soon for networks without a norm before their
classifier.
"""


@dataclass(frozen=True)
class Duration:
    """A length of training, written `5ep`, `2000st` or `5%`: epochs, optimiser steps, or a share of the run."""

    amount: float
    unit: str

    @staticmethod
    def parse(text: str) -> Duration:
        """Parses a duration. Raises ConfigError where `text` is none."""
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ep|st|%)", text.strip())
        if not match:
            raise ConfigError(
                f"{text!r} is no duration; write epochs as 5ep, steps as 2000st, or a share of the run as 5%."
            )
        return Duration(float(match[1]), match[2])

    def exact(self, steps_per_epoch: int, total_steps: int) -> float:
        """The length in steps, not rounded."""
        return self.amount * {"ep": steps_per_epoch, "st": 1, "%": total_steps / 100}[self.unit]

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """The length in steps, rounded."""
        return round(self.exact(steps_per_epoch, total_steps))


@dataclass(frozen=True)
class Course:
    """The time of a schedule in a run, in ticks (steps or epochs) since the end of the warm-up."""

    steps_per_epoch: int
    total: int
    """Steps of the run."""
    warmup: int
    """Steps of the warm-up."""
    tick: int
    """Steps in a tick."""
    length: int
    """Ticks until the horizon."""

    def ticks(self, step: int) -> int:
        """The ticks at a step after the warm-up; once an epoch, those at the epoch's beginning."""
        return step // self.tick - self.warmup // self.tick

    def step(self, ticks: float) -> int:
        """The step at a number of ticks."""
        return round((self.warmup // self.tick + ticks) * self.tick)

    def progress(self, ticks: int) -> float:
        """The progress from 0 at the end of the warm-up to 1 at the horizon and after it."""
        return min(ticks / self.length, 1.0)

    def place(self, text: str) -> int:
        """The ticks at a place in the run, written as a `Duration`."""
        return round(Duration.parse(text).steps(self.steps_per_epoch, self.total) / self.tick) - (
            self.warmup // self.tick
        )

    def period(self, name: str, text: str) -> int:
        """The ticks of a period; a share is one of what follows the warm-up. Raises ConfigError for no length."""
        ticks = whole_period(text, self.steps_per_epoch, self.total - self.warmup, self.tick)
        if ticks < 1:
            raise ConfigError(f"{name} is {text}; expected some length, such as 30ep or 25%.")
        return ticks


def warmup_steps(text: str, steps_per_epoch: int, total_steps: int) -> int:
    """The length in steps of a warm-up, a `Duration` or `auto`. Raises ConfigError where `text` is neither."""
    if text == AUTO:
        return round(min(max(WARMUP_SHARE * total_steps, SHORTEST_WARMUP), LONGEST_WARMUP_SHARE * total_steps))
    return Duration.parse(text).steps(steps_per_epoch, total_steps)


def whole_period(text: str, steps_per_epoch: int, steps: int, tick: int = 1) -> int:
    """A length in ticks, rounded up; a share is one of `steps`.

    Rounded down, a run of four quarters would end with the peak of a fifth.
    """
    return math.ceil(Duration.parse(text).exact(steps_per_epoch, steps) / tick - 1e-6)
