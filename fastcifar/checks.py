"""Checks of single settings, each with its one sentence; free of torch."""

from __future__ import annotations

from collections.abc import Iterable

from fastcifar.errors import ConfigError, unknown


def check_name(kind: str, name: str, valid: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest names, where `name` is not among `valid`."""
    if name not in set(valid):
        raise ConfigError(unknown(kind, name, valid))


def check_range(
    name: str, value: float | None, low: float, high: float = float("inf"), *, exclusive: bool = False
) -> None:
    """Raises ConfigError where `value` is given and below `low`, above `high`, or, if `exclusive`, equal to `low`."""
    if value is None or (low <= value <= high and not (exclusive and value == low)):
        return
    expected = f"above {low}" if exclusive else f"{low} or more"
    if high != float("inf"):
        expected = f"above {low}, at most {high}" if exclusive else f"{low} to {high}"
    raise ConfigError(f"{name} is {value}; expected {expected}.")
