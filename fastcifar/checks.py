"""Checks of single settings, free of torch. Each error is one sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastcifar.errors import ConfigError, unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Section = TypeVar("Section", bound="DataclassInstance")


def given(value: T | None) -> T:
    """Returns `value`, which a resolved configuration always has; only the type allows None."""
    assert value is not None
    return value


def check_name(kind: str, name: str, valid: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest names, where `name` is not among `valid`."""
    if name not in set(valid):
        raise ConfigError(unknown(kind, name, valid))


def check_range(
    name: str, value: float | None, low: float, high: float = float("inf"), *, exclusive: bool = False
) -> None:
    """Raises ConfigError where a given `value` is no number from `low` to `high` (`low` itself out if `exclusive`)."""
    if value is None:
        return
    if not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; expected a number.")
    if low <= value <= high and value != float("inf") and not (exclusive and value == low):
        return
    expected = f"above {low}" if exclusive else f"{low} or more"
    if high != float("inf"):
        expected = f"above {low}, at most {high}" if exclusive else f"{low} to {high}"
    raise ConfigError(f"{name} is {value}; expected {expected}.")


def check_reads(kind: str, name: str, given: Mapping[str, Any], reads: Collection[str]) -> None:
    """Raises ConfigError where a setting in `given` is not None but is not read by the `kind` called `name`."""
    for setting, value in given.items():
        if value is not None and setting not in reads:
            known = f"it reads {', '.join(reads)}" if reads else "leave it out"
            raise ConfigError(f"the {kind} {name} does not read {setting}; {known}.")


def filled(section: Section, defaults: Mapping[str, Any]) -> Section:
    """Returns `section` with `defaults` in place of None."""
    return replace(section, **{name: own for name, own in defaults.items() if getattr(section, name) is None})
