"""Learning-rate schedules: pure functions of the progress of a run, tabulated once for every step.

Where `torch.optim.lr_scheduler` has a schedule, the table equals torch's at every step up to the horizon, after which
the last value is held. Torch's lengths are independent of the run, so they are easily mistaken. The mistakes of report
4 are written as follows, all without warm-up (0%) and per epoch:

- `LinearLR` with its defaults: linear, start_lr 1/3, final_lr 1, horizon 5ep;
- `PolynomialLR` with its defaults: polynomial, horizon 5ep, after which the rate is 0;
- `OneCycleLR` of 25,600 steps, stepped once an epoch: one-cycle, horizon 25600ep;
- `CosineAnnealingLR` with a T_max of 200: cosine, horizon 200ep, and in more than 200 epochs, periodic.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from itertools import accumulate, count, takewhile
from typing import Any, Literal

from fastcifar.checks import check_name, check_range, check_reads, filled, given
from fastcifar.errors import ConfigError
from fastcifar.optim.course import AUTO, Course, Duration, warmup_steps, whole_period

Pace = Literal["step", "epoch"]


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of the learning rate. What is left out is the schedule's own; what it does not read is refused."""

    schedule: str = "cosine"
    """Course of the learning rate after the warm-up; swa is constant, then linear, then constant, and swalr a cosine
    that turns to a constant."""
    warmup: str | None = None
    """Linear warm-up, such as 5ep (epochs), 2000st (steps) or 5% of the run; none before one-cycle, else by default
    `auto`: 5%, at least 200 steps, at most a quarter of the run."""
    per: Pace | None = None
    """Whether the schedule moves on every step, or once an epoch; the warm-up always rises every step."""
    horizon: str | None = None
    """Where in the run the schedule comes to its end, which is then held. It may lie beyond the run's."""
    start_lr: float | None = None
    """Share of the peak at the start."""
    final_lr: float | None = None
    """Share of the peak at the end. In plateau, the lowest share."""
    milestones: tuple[str, ...] | None = None
    """Where in the run multistep falls."""
    step_size: str | None = None
    """Length of each step; a share is one of what follows the warm-up."""
    gamma: float | None = None
    """Factor of each fall."""
    restart_period: str | None = None
    """Length of the first cycle (T_0) of warm-restarts; a share is one of what follows the warm-up."""
    restart_factor: int | None = None
    """How many times as long each cycle is as the one before it (T_mult)."""
    snapshots: bool = False
    """Keep the weights at the end of each cycle of warm-restarts, as members of an ensemble."""
    power: float | None = None
    """Exponent of polynomial; 1 is a straight line."""
    patience: int | None = None
    """Epochs without a lower loss after which plateau falls."""
    cycle_momentum: bool | None = None
    """Let one-cycle set the momentum of SGD: from 0.95 to 0.85 at the peak, and back. Other optimisers keep theirs."""
    periodic: bool = False
    """Let cosine rise again after its horizon, and fall, and so on."""

    def __post_init__(self) -> None:
        check_name("schedule", self.schedule, SCHEDULES)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("schedule", "warmup")}
        given |= {"snapshots": self.snapshots or None, "periodic": self.periodic or None}
        check_reads("schedule", self.schedule, given, [name for name in self.defaults if name != "warmup"])
        warmup = None if self.warmup == AUTO else self.warmup
        for text in (warmup, self.horizon, self.step_size, self.restart_period, *(self.milestones or ())):
            if text is not None:
                Duration.parse(text)
        check_range("start_lr", self.start_lr, 0, 1)
        check_range("final_lr", self.final_lr, 0, 1)
        check_range("gamma", self.gamma, 0, 1, exclusive=True)
        check_range("restart_factor", self.restart_factor, 1, 1000)
        check_range("power", self.power, 0, exclusive=True)
        check_range("patience", self.patience, 0)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that the schedule reads, with the values that stand for None."""
        return {"warmup": AUTO, **options(SCHEDULES[self.schedule])}

    @property
    def resolved(self) -> ScheduleConfig:
        """Returns a copy with None replaced by the default where the setting is read."""
        return filled(self, self.defaults)


@dataclass(frozen=True)
class Curve:
    """The values of a schedule in a run."""

    factor: Callable[[int], float]
    """The share of the peak, given the ticks since the warm-up."""
    kinks: Iterable[float] = ()
    """Ticks at which the curve jumps or bends, ascending, maybe endless, without those of warm-up and horizon."""
    momentum: Callable[[int], float] | None = None
    """The momentum, given the ticks since the warm-up, where the schedule sets it."""


Schedule = Callable[..., Curve]
"""Takes the run's `Course`, and by keyword the settings of `ScheduleConfig` that it reads, with its own defaults.

The `Course` already accounts for `per`, `horizon` and `warmup`.
"""


def options(schedule: Schedule) -> dict[str, Any]:
    """The settings that a schedule reads, with their defaults."""
    parameters = signature(schedule).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}


def swing(start: float, end: float, share: float) -> float:
    """The value on half a cosine from `start` to `end`, `share` of the way along."""
    return end + (start - end) * (1.0 + math.cos(math.pi * share)) / 2


def constant(course: Course) -> Curve:
    return Curve(lambda ticks: 1.0)


def step(course: Course, *, per: Pace = "step", step_size: str = "30%", gamma: float = 0.1) -> Curve:
    """Multiplies by gamma after every `step_size`."""
    size = course.period("step_size", step_size)
    return Curve(lambda ticks: gamma ** (ticks // size), count(size, size))


def multistep(
    course: Course,
    *,
    per: Pace = "step",
    milestones: tuple[str, ...] = ("30%", "60%", "80%"),
    gamma: float = 0.2,
) -> Curve:
    """Multiplies by gamma at every milestone; defaults of Zagoruyko and Komodakis 2016, arXiv:1605.07146."""
    places = sorted(map(course.place, milestones))
    return Curve(lambda ticks: gamma ** bisect_right(places, ticks), places)


def cosine(
    course: Course, *, per: Pace = "step", horizon: str = "100%", final_lr: float = 0.0, periodic: bool = False
) -> Curve:
    """Cosine annealing without restarts: Loshchilov and Hutter 2017, arXiv:1608.03983."""
    if periodic:
        return Curve(lambda ticks: swing(1.0, final_lr, ticks / course.length))
    return Curve(lambda ticks: swing(1.0, final_lr, course.progress(ticks)))


def warm_restarts(
    course: Course,
    *,
    per: Pace = "step",
    restart_period: str = "25%",
    restart_factor: int = 1,
    final_lr: float = 0.0,
    snapshots: bool = False,
) -> Curve:
    """Cosine annealing with restarts, each cycle `restart_factor` times as long as the last."""
    first = course.period("restart_period", restart_period)

    def factor(ticks: int) -> float:
        period = first
        if restart_factor == 1:
            ticks %= period
        while ticks >= period:
            ticks, period = ticks - period, period * restart_factor
        return swing(1.0, final_lr, ticks / period)

    return Curve(factor, accumulate(first * restart_factor**cycle for cycle in count()))


def linear(
    course: Course, *, per: Pace = "step", horizon: str = "100%", start_lr: float = 1.0, final_lr: float = 0.0
) -> Curve:
    return Curve(lambda ticks: start_lr + (final_lr - start_lr) * course.progress(ticks))


def polynomial(
    course: Course, *, per: Pace = "step", horizon: str = "100%", power: float = 1.0, final_lr: float = 0.0
) -> Curve:
    return Curve(lambda ticks: final_lr + (1.0 - final_lr) * (1.0 - course.progress(ticks)) ** power)


RISE = 0.3
"""Share of the one-cycle schedule before its peak."""
LOWEST_MOMENTUM, HIGHEST_MOMENTUM = 0.85, 0.95
"""The momentum at the peak of the one-cycle schedule, and at its ends."""


def one_cycle(
    course: Course,
    *,
    warmup: str = "0%",
    per: Pace = "step",
    horizon: str = "100%",
    start_lr: float = 0.04,
    final_lr: float = 4e-6,
    cycle_momentum: bool = True,
) -> Curve:
    """Rises by half a cosine, then falls by another: Smith and Topin 2018, arXiv:1708.07120, as in `OneCycleLR`."""
    peak, last = RISE * course.length - 1, course.length - 1

    def cycle(start: float, middle: float, end: float) -> Callable[[int], float]:
        def value(ticks: int) -> float:
            if ticks <= peak:
                return swing(start, middle, ticks / peak)
            return swing(middle, end, (min(ticks, last) - peak) / (last - peak))

        return value

    momentum = cycle(HIGHEST_MOMENTUM, LOWEST_MOMENTUM, HIGHEST_MOMENTUM) if cycle_momentum else None
    return Curve(cycle(start_lr, 1.0, final_lr), (peak,), momentum)


def plateau(course: Course, *, gamma: float = 0.1, patience: int = 10, final_lr: float = 0.0) -> Curve:
    """Constant; `Plateau` lowers it as the run goes on."""
    return constant(course)


LEVEL, SLOPE = 0.5, 0.4
"""Shares of the averaging schedule that stay at the peak, and then fall."""


def swa(course: Course, *, per: Pace = "step", horizon: str = "100%", final_lr: float = 0.1) -> Curve:
    """Constant, linear, constant: Izmailov et al. 2018, arXiv:1803.05407.

    In the authors' code the horizon is where the averaging starts.
    """

    def factor(ticks: int) -> float:
        fallen = min(max((course.progress(ticks) - LEVEL) / SLOPE, 0.0), 1.0)
        return 1.0 + (final_lr - 1.0) * fallen

    return Curve(factor, (LEVEL * course.length, (LEVEL + SLOPE) * course.length))


ANNEAL_EPOCHS = 10
"""How long `swalr` takes to turn to its constant."""


def swalr(course: Course, *, per: Pace = "step", horizon: str = "75%", final_lr: float = 0.5) -> Curve:
    """A cosine over the whole run gives way, at the horizon, to a constant: `torch.optim.swa_utils.SWALR`."""
    whole, anneal = course.place("100%"), ANNEAL_EPOCHS * course.steps_per_epoch / course.tick
    left = swing(1.0, 0.0, course.length / whole)

    def factor(ticks: int) -> float:
        if ticks < course.length:
            return swing(1.0, 0.0, ticks / whole)
        return swing(left, final_lr, min((ticks - course.length) / anneal, 1.0))

    return Curve(factor, (course.length + anneal,))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "step": step,
    "multistep": multistep,
    "cosine": cosine,
    "warm-restarts": warm_restarts,
    "linear": linear,
    "polynomial": polynomial,
    "one-cycle": one_cycle,
    "plateau": plateau,
    "swa": swa,
    "swalr": swalr,
}
"""The schedules by name. Defaults are torch's where it has any and nothing else is said."""


def lr_table(schedule: ScheduleConfig, peak: float, steps_per_epoch: int, epochs: int) -> list[float]:
    """The learning rate of each step of a run: a linear warm-up from 0, then the schedule.

    For a plateau this is the table that `Plateau` scales.

    Raises:
        ConfigError: the run has too many steps, the warm-up fills it or reaches the horizon, or a period has no length.
    """
    course, curve = lay_out(schedule, steps_per_epoch, epochs)
    start = peak * curve.factor(0)
    rising = [start * (step + 1) / course.warmup for step in range(course.warmup)]
    return rising + [peak * curve.factor(course.ticks(step)) for step in range(course.warmup, course.total)]


def momentum_table(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[float] | None:
    """The momentum of each step of a run, or None where the optimiser keeps its own. Raises as `lr_table`."""
    course, curve = lay_out(schedule, steps_per_epoch, epochs)
    if curve.momentum is None:
        return None
    return [curve.momentum(max(course.ticks(step), 0)) for step in range(course.total)]


def kinks(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[int]:
    """The steps of a run at which its curve jumps or bends, ascending, without epoch stairs. Raises as `lr_table`."""
    course, curve = lay_out(schedule, steps_per_epoch, epochs)
    own = takewhile(lambda step: step < course.total, map(course.step, curve.kinks))
    steps = {course.warmup, course.step(course.length), *own}
    return sorted(step for step in steps if 0 < step < course.total)


ALL_BUT_COMPLETE, MOST_SNAPSHOTS = 0.95, 20
"""The share of the last cycle that must be done for it to count as ended with the run; and most snapshots of a run.

The share is below 1 since periods are rounded up. Once an epoch, rounding may exceed this: `fastcifar plan` lists the
snapshots.
"""


def cycle_ends(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[int]:
    """The numbers of steps after which a cycle of warm restarts ends, ascending, the run's end included if it is one.

    Raises:
        ConfigError: as `lr_table`; or no cycle ends, or more than `MOST_SNAPSHOTS` do.
    """
    course, curve = lay_out(schedule, steps_per_epoch, epochs)
    ends, begin = [], course.warmup
    for end in map(course.step, curve.kinks):
        if min(end, course.total) - begin >= ALL_BUT_COMPLETE * (end - begin):
            ends.append(min(end, course.total))
        if end >= course.total:
            break
        begin = end
    if not 1 <= len(ends) <= MOST_SNAPSHOTS:
        raise ConfigError(
            f"--snapshots would keep {len(ends)}, expected 1 to {MOST_SNAPSHOTS}; choose another --restart-period."
        )
    return ends


def in_steps(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> ScheduleConfig:
    """`schedule` with its lengths in steps, for a run of that length; a horizon at the end of the run stays there."""
    resolved, total = schedule.resolved, steps_per_epoch * epochs
    warmup = warmup_steps(given(resolved.warmup), steps_per_epoch, total)

    def place(text: str) -> str:
        return f"{Duration.parse(text).steps(steps_per_epoch, total)}st"

    def period(text: str | None) -> str | None:
        return text and f"{whole_period(text, steps_per_epoch, total - warmup)}st"

    return replace(
        resolved,
        warmup=f"{warmup}st",
        horizon=resolved.horizon if resolved.horizon in (None, "100%") else place(resolved.horizon),
        milestones=resolved.milestones and tuple(map(place, resolved.milestones)),
        step_size=period(resolved.step_size),
        restart_period=period(resolved.restart_period),
    )


def horizon_steps(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> int:
    """The step at which the schedule ends, which may be after the run's end."""
    return Duration.parse(schedule.resolved.horizon or "100%").steps(steps_per_epoch, steps_per_epoch * epochs)


MOST_STEPS = 10_000_000
"""The longest run, since every step has an entry in tables of learning rates and decays."""


def lay_out(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> tuple[Course, Curve]:
    """The course and the curve of a schedule in a run of that length. Raises as `lr_table`."""
    resolved, total = schedule.resolved, steps_per_epoch * epochs
    tick = steps_per_epoch if resolved.per == "epoch" else 1
    warmup = warmup_steps(given(resolved.warmup), steps_per_epoch, total)
    horizon = horizon_steps(schedule, steps_per_epoch, epochs)
    if total > MOST_STEPS:
        raise ConfigError(
            f"{epochs} epochs of {steps_per_epoch} steps are more than the {MOST_STEPS:,} steps that a run may have; "
            "lower --epochs or raise --batch-size."
        )
    if warmup >= total:
        raise ConfigError(
            f"a warm-up of {warmup} steps fills the whole run of {total}; shorten --warmup or train longer."
        )
    length = round(horizon / tick) - warmup // tick
    if horizon <= warmup or length < 1:
        raise ConfigError(
            f"the horizon {resolved.horizon} is not beyond the warm-up of {warmup} steps; move --horizon or shorten "
            "--warmup."
        )
    course, build = Course(steps_per_epoch, total, warmup, tick, length), SCHEDULES[schedule.schedule]
    return course, build(course, **{name: getattr(resolved, name) for name in options(build)})
