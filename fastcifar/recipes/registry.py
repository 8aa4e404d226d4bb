"""Declares recipes, and derives one from another; free of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Any, Literal

from fastcifar.checks import Section, check_name
from fastcifar.config import ModelConfig, RunConfig, ScheduleConfig

Measure = Literal["weights", "average", "ensemble"]
"""The subject of a claim: a run's weights, the one average that it keeps, or several runs together."""


@dataclass(frozen=True)
class Recipe:
    """A configuration with a name, and the claim for it."""

    name: str
    config: RunConfig
    parent: str | None
    """The recipe that this one is derived from."""
    about: str
    """Its purpose; empty where its one change says it."""
    source: str
    """Where it is reported, such as R1 T5 (report 1, table 5), or `ours`."""
    claim: float | None
    """Reported test accuracy as a fraction; for our own recipes, the reported one to reach."""
    measure: Measure

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the parent's, or from the defaults where there is none."""
        return difference(self.config, RECIPES[self.parent].config if self.parent else RunConfig())


RECIPES: dict[str, Recipe] = {}


def add(name: str, config: RunConfig, about: str, source: str, claim: float | None, measure: Measure) -> None:
    """Registers `config`, which still has its parent's name, as the recipe `name`."""
    if name in RECIPES:
        raise ValueError(f"the recipe {name} is declared twice")
    RECIPES[name] = Recipe(name, replace(config, recipe=name), config.recipe, about, source, claim, measure)


def declare(
    source: str, claim: float | None = None, measure: Measure = "weights"
) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    """Decorates a function so that its configuration is registered, and returned, as the recipe of its name."""

    def register(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        name = function.__name__
        add(name, function(), inspect.getdoc(function) or "", source, claim, measure)
        return wraps(function)(lambda: RECIPES[name].config)

    return register


def variant(
    name: str,
    parent: str,
    source: str,
    claim: float | None = None,
    measure: Measure = "weights",
    about: str = "",
    **changes: Any,
) -> None:
    """Declares a recipe that is `parent` with `changes`; `about` adds what they do not say."""
    add(name, derive(RECIPES[parent].config, **changes), about, source, claim, measure)


def derive(parent: Section, **changes: Any) -> Section:
    """Returns `parent` with settings changed, each by the name of its flag.

    Raises:
        ConfigError: no setting has such a name, a value is out of range, or what was chosen does not read a setting.
    """
    for name in changes:
        check_name("setting", name, settings(parent))
    parts = {}
    for field in fields(parent):
        if is_dataclass(part := getattr(parent, field.name)):
            parts[field.name] = {f.name: changes.pop(f.name) for f in fields(part) if f.name in changes}
    return replace(
        parent, **{name: replace(getattr(parent, name), **own) for name, own in parts.items() if own}, **changes
    )


def without_replaced(start: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Drops the options of an architecture, optimiser, schedule or loss that `changes` replace by another."""

    def replaced(setting: str, current: str) -> bool:
        return changes.get(setting) not in (None, current)

    if replaced("arch", start.model.arch):
        start = replace(start, model=ModelConfig())
    if replaced("optimizer", start.optim.optimizer):
        start = replace(start, optim=replace(start.optim, lr=None, momentum=None, weight_decay=None))
    if replaced("schedule", start.schedule.schedule):
        start = replace(start, schedule=ScheduleConfig(warmup=start.schedule.warmup))
    if replaced("loss", start.loss.loss):
        start = replace(start, loss=replace(start.loss, label_smoothing=None, gamma_pos=None, gamma_neg=None))
    return start


def difference(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """The settings of `config` that differ from `base`, by the names of their flags, without the recipe's name."""
    before = settings(base)
    return {name: value for name, value in settings(config).items() if value != before[name] and name != "recipe"}


def settings(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= settings(value) if is_dataclass(value) else {field.name: value}
    return found
