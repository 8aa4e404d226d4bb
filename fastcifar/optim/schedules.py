"""Learning-rate schedules: pure functions of how far a run has come, tabulated once for every step.

Where `torch.optim.lr_scheduler` has a schedule, the table is torch's at every step up to the horizon; from there on the
end is held. Torch's lengths know nothing of the run, so they are easily mistaken; the mistakes of report 4 are written
so, all without warm-up (0%):

- `LinearLR` with its defaults: linear, start_lr 1/3, final_lr 1, horizon 5ep, per epoch;
- `PolynomialLR` with its defaults: polynomial, horizon 5ep, per epoch, after which the rate is 0;
- `OneCycleLR` of 25,600 steps, stepped once an epoch: one-cycle, horizon 25600ep, per epoch;
- `CosineAnnealingLR` with a T_max of 200 in 100 epochs: cosine, horizon 200ep, per epoch.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, takewhile
from typing import TYPE_CHECKING, Any

from fastcifar.errors import ConfigError

if TYPE_CHECKING:
    from fastcifar.config import ScheduleConfig


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
            raise ConfigError(
                f"{text!r} is no duration; write epochs as 5ep, steps as 2000st, or a share of the run as 5%."
            )
        return Duration(float(match[1]), match[2])

    def exact(self, steps_per_epoch: int, total_steps: int) -> float:
        """In steps and parts of one."""
        return self.amount * {"ep": steps_per_epoch, "st": 1, "%": total_steps / 100}[self.unit]

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """The nearest number of whole steps."""
        return round(self.exact(steps_per_epoch, total_steps))


AUTO, WARMUP_SHARE, SHORTEST_WARMUP, LONGEST_WARMUP_SHARE = "auto", 0.05, 200, 0.25
"""The warm-up where none is asked for: a share of the run, but at least so many steps, unless they are more than the
larger share of it.

A share alone takes a short run to its peak within a few steps, which is too soon for networks without a norm before
their classifier.
"""


def warmup_steps(text: str, steps_per_epoch: int, total_steps: int) -> int:
    """The length of a warm-up, a `Duration` or `auto`. Raises ConfigError where `text` is neither."""
    if text == AUTO:
        return round(min(max(WARMUP_SHARE * total_steps, SHORTEST_WARMUP), LONGEST_WARMUP_SHARE * total_steps))
    return Duration.parse(text).steps(steps_per_epoch, total_steps)


@dataclass(frozen=True)
class Course:
    """The settings of a schedule in one run. Its own time is in ticks, which are steps or epochs, and 0 when the
    warm-up ends.
    """

    warmup: int
    """Steps."""
    tick: int
    """Steps from one value to the next."""
    length: int
    """Ticks to the horizon."""
    milestones: tuple[int, ...] = ()
    """Ticks, ascending."""
    step_size: int = 1
    """Ticks."""
    restart_period: int = 1
    """Ticks of the first cycle."""
    restart_factor: int = 1
    start_lr: float = 1.0
    """A share of the peak, as `final_lr` is."""
    final_lr: float = 0.0
    gamma: float = 1.0
    power: float = 1.0

    def ticks(self, step: int) -> int:
        """The schedule's own time at a step after the warm-up; once an epoch means at the epoch's beginning."""
        return step // self.tick - self.warmup // self.tick

    def step(self, ticks: float) -> int:
        """The step at that time."""
        return round((self.warmup // self.tick + ticks) * self.tick)


def progress(ticks: int, course: Course) -> float:
    """From 0, when the warm-up ends, to 1 at the horizon and ever after."""
    return min(ticks / course.length, 1.0)


def swing(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`, `share` of the way along."""
    return end + (start - end) * (1.0 + math.cos(math.pi * share)) / 2


def constant(ticks: int, course: Course) -> float:
    return 1.0


def step(ticks: int, course: Course) -> float:
    """Times gamma after every `step_size`."""
    return course.gamma ** (ticks // course.step_size)


def multistep(ticks: int, course: Course) -> float:
    """Times gamma at every milestone."""
    return course.gamma ** bisect_right(course.milestones, ticks)


def cosine(ticks: int, course: Course) -> float:
    """Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts."""
    return swing(1.0, course.final_lr, progress(ticks, course))


def warm_restarts(ticks: int, course: Course) -> float:
    """The same with restarts, each cycle `restart_factor` times as long as the one before it."""
    period = course.restart_period
    if course.restart_factor == 1:
        ticks %= period
    while ticks >= period:
        ticks, period = ticks - period, period * course.restart_factor
    return swing(1.0, course.final_lr, ticks / period)


def linear(ticks: int, course: Course) -> float:
    return course.start_lr + (course.final_lr - course.start_lr) * progress(ticks, course)


def polynomial(ticks: int, course: Course) -> float:
    return course.final_lr + (1.0 - course.final_lr) * (1.0 - progress(ticks, course)) ** course.power


RISE = 0.3
"""Share of a one-cycle until its peak."""


def one_cycle(ticks: int, course: Course) -> float:
    """Up by half a cosine, then down by another: Smith and Topin 2018, arXiv:1708.07120, in the two phases of
    torch's `OneCycleLR`.
    """
    peak, last = RISE * course.length - 1, course.length - 1
    if ticks <= peak:
        return swing(course.start_lr, 1.0, ticks / peak)
    return swing(1.0, course.final_lr, (min(ticks, last) - peak) / (last - peak))


LEVEL, SLOPE = 0.5, 0.4
"""Shares of the way that the schedule of stochastic weight averaging stays at the peak, and then falls."""


def swa(ticks: int, course: Course) -> float:
    """Constant, linear, constant: Izmailov et al. 2018, arXiv:1803.05407, whose code has the horizon where the
    averaging starts.
    """
    fallen = min(max((progress(ticks, course) - LEVEL) / SLOPE, 0.0), 1.0)
    return 1.0 + (course.final_lr - 1.0) * fallen


def no_kinks(course: Course) -> Iterable[float]:
    return ()


@dataclass(frozen=True)
class Schedule:
    """A course of the learning rate."""

    factor: Callable[[int, Course], float]
    """Share of the peak, given the ticks since the warm-up."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What it reads of `ScheduleConfig`, besides the warm-up, and what it makes of None."""
    kinks: Callable[[Course], Iterable[float]] = no_kinks
    """Ticks at which the curve jumps or bends, ascending, perhaps without end; those of warm-up and horizon left
    out.
    """


PER, COURSE = {"per": "step"}, {"per": "step", "horizon": "100%"}

SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(constant),
    "step": Schedule(
        step, {**PER, "step_size": "30%", "gamma": 0.1}, lambda course: count(course.step_size, course.step_size)
    ),
    "multistep": Schedule(
        multistep, {**PER, "milestones": ("30%", "60%", "80%"), "gamma": 0.2}, lambda course: course.milestones
    ),
    "cosine": Schedule(cosine, {**COURSE, "final_lr": 0.0}),
    "warm-restarts": Schedule(
        warm_restarts,
        {**PER, "restart_period": "25%", "restart_factor": 1, "final_lr": 0.0, "snapshots": False},
        lambda course: accumulate(course.restart_period * course.restart_factor**cycle for cycle in count()),
    ),
    "linear": Schedule(linear, {**COURSE, "start_lr": 1.0, "final_lr": 0.0}),
    "polynomial": Schedule(polynomial, {**COURSE, "power": 1.0, "final_lr": 0.0}),
    "one-cycle": Schedule(
        one_cycle,
        {**COURSE, "warmup": "0%", "start_lr": 0.04, "final_lr": 4e-6},
        lambda course: (RISE * course.length - 1,),
    ),
    "plateau": Schedule(constant, {"gamma": 0.1, "patience": 10, "final_lr": 0.0}),
    "swa": Schedule(
        swa, {**COURSE, "final_lr": 0.1}, lambda course: (LEVEL * course.length, (LEVEL + SLOPE) * course.length)
    ),
}
"""By name. Multistep's defaults are those of Zagoruyko and Komodakis 2016, arXiv:1605.07146; the others' are torch's
where it has any.
"""


def lr_table(schedule: ScheduleConfig, peak: float, steps_per_epoch: int, epochs: int) -> list[float]:
    """The learning rate of each step of a run: in the warm-up, a line from 0 to where the schedule begins; then the
    schedule.

    For a plateau this is the table that `Plateau` scales.

    Raises:
        ConfigError: the warm-up fills the run or reaches the horizon, or a period has no length.
    """
    course, factor = lay_out(schedule, steps_per_epoch, epochs), SCHEDULES[schedule.schedule].factor
    start = peak * factor(0, course)
    rising = [start * (step + 1) / course.warmup for step in range(course.warmup)]
    return rising + [
        peak * factor(course.ticks(step), course) for step in range(course.warmup, steps_per_epoch * epochs)
    ]


def kinks(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[int]:
    """The steps of a run at which its curve jumps or bends, ascending, but for the steps of an epoch each. Raises as
    `lr_table`.
    """
    course, total = lay_out(schedule, steps_per_epoch, epochs), steps_per_epoch * epochs
    own = takewhile(lambda ticks: course.step(ticks) < total, SCHEDULES[schedule.schedule].kinks(course))
    steps = {course.warmup, course.step(course.length), *map(course.step, own)}
    return sorted(step for step in steps if 0 < step < total)


ALL_BUT_COMPLETE, MOST_SNAPSHOTS = 0.95, 20
"""Share of the last cycle after which it counts as ended where the run ends, since periods are rounded up (to whole
epochs, with a value an epoch, which may be more than this share allows for: `fastcifar plan` lists the snapshots); and
snapshots of a run."""


def cycle_ends(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[int]:
    """How many steps of a run are done where a cycle of warm restarts ends, ascending; the run's own end among them
    where it is one.

    Raises:
        ConfigError: as `lr_table`; or no cycle ends, or more than `MOST_SNAPSHOTS` do.
    """
    course, total = lay_out(schedule, steps_per_epoch, epochs), steps_per_epoch * epochs
    ends, begin = [], course.warmup
    for end in map(course.step, SCHEDULES["warm-restarts"].kinks(course)):
        if min(end, total) - begin >= ALL_BUT_COMPLETE * (end - begin):
            ends.append(min(end, total))
        if end >= total:
            break
        begin = end
    if not 1 <= len(ends) <= MOST_SNAPSHOTS:
        raise ConfigError(
            f"--snapshots would keep {len(ends)}, expected 1 to {MOST_SNAPSHOTS}; choose another --restart-period."
        )
    return ends


def in_steps(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> ScheduleConfig:
    """`schedule` as it is in a run of that length, with its lengths written in steps; a horizon at the end of the
    run stays there.
    """
    given, total = schedule.resolved, steps_per_epoch * epochs
    warmup = warmup_steps(given.warmup, steps_per_epoch, total)

    def place(text: str | None) -> str | None:
        return text and f"{Duration.parse(text).steps(steps_per_epoch, total)}st"

    def period(text: str | None) -> str | None:
        return text and f"{whole_period(text, steps_per_epoch, total - warmup)}st"

    return replace(
        given,
        warmup=f"{warmup}st",
        horizon=given.horizon if given.horizon == "100%" else place(given.horizon),
        milestones=given.milestones and tuple(map(place, given.milestones)),
        step_size=period(given.step_size),
        restart_period=period(given.restart_period),
    )


def whole_period(text: str, steps_per_epoch: int, steps: int, tick: int = 1) -> int:
    """A length in ticks, `steps` being what its share is of; rounded up: a run of four quarters must not end with
    the peak of a fifth.
    """
    return math.ceil(Duration.parse(text).exact(steps_per_epoch, steps) / tick - 1e-6)


def horizon_steps(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> int:
    """The step at which the schedule has come to its end, or would after the run's."""
    total = steps_per_epoch * epochs
    return Duration.parse(schedule.resolved.horizon or "100%").steps(steps_per_epoch, total)


def lay_out(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> Course:
    """The settings of a schedule in a run of that length. Raises as `lr_table`."""
    given, total = schedule.resolved, steps_per_epoch * epochs
    tick = steps_per_epoch if given.per == "epoch" else 1
    warmup = warmup_steps(given.warmup, steps_per_epoch, total)
    horizon = horizon_steps(schedule, steps_per_epoch, epochs)
    if warmup >= total:
        raise ConfigError(
            f"a warm-up of {warmup} steps fills the whole run of {total}; shorten --warmup or train longer."
        )
    origin = warmup // tick
    length = round(horizon / tick) - origin
    if horizon <= warmup or length < 1:
        raise ConfigError(
            f"the horizon {given.horizon} is not beyond the warm-up of {warmup} steps; move --horizon or shorten "
            "--warmup."
        )

    def period(name: str) -> int:
        ticks = whole_period(getattr(given, name), steps_per_epoch, total - warmup, tick)
        if ticks < 1:
            raise ConfigError(f"{name} is {getattr(given, name)}; expected some length, such as 30ep or 25%.")
        return ticks

    periods = {name: period(name) for name in ("step_size", "restart_period") if getattr(given, name) is not None}
    places = [Duration.parse(place).steps(steps_per_epoch, total) for place in given.milestones or ()]
    milestones = tuple(sorted(round(place / tick) - origin for place in places))
    numbers = {name: getattr(given, name) for name in ("restart_factor", "start_lr", "final_lr", "gamma", "power")}
    known = {name: number for name, number in numbers.items() if number is not None}
    return Course(warmup=warmup, tick=tick, length=length, milestones=milestones, **periods, **known)


THRESHOLD, LEAST_CHANGE = 1e-4, 1e-8
"""A loss must fall by this share to count as better, and the factor by this much to change at all: torch's defaults."""


@dataclass
class Plateau:
    """Lowers the learning rate once the loss has not improved for `patience` epochs, as torch's `ReduceLROnPlateau`
    does.

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
        """Takes in the loss after an epoch; returns the factor of the rest of the table."""
        better = loss < self.best * (1.0 - THRESHOLD)
        self.best, self.bad_epochs = (loss, 0) if better else (self.best, self.bad_epochs + 1)
        if self.bad_epochs > self.patience:
            reduced, self.bad_epochs = max(self.factor * self.gamma, self.final_lr), 0
            self.factor = reduced if self.factor - reduced > LEAST_CHANGE else self.factor
        return self.factor

    def state(self) -> dict[str, float]:
        """What changes from epoch to epoch, as plain numbers; `best` is infinite before the first."""
        return {"factor": self.factor, "best": self.best, "bad_epochs": float(self.bad_epochs)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on from `state`."""
        self.factor, self.best, self.bad_epochs = state["factor"], state["best"], int(state["bad_epochs"])
