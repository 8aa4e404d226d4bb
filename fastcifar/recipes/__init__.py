"""Recipes by name: functions without arguments that return a `RunConfig`, in a file for each report. Free of torch.

The plain name is the reading that makes sense; `NAME_as_written` is what the report did where that was a mistake. What
a report leaves open is read from the source that it builds on, and said in the docstring. A report that chose by the
test set has recipes that watch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module

from fastcifar.config import RunConfig
from fastcifar.errors import ConfigError, unknown
from fastcifar.recipes.registry import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "recipe", "select"]

for module in ("report1", "report2", "report3", "report4", "report5", "own"):
    import_module(f"{__name__}.{module}")


def recipe(name: str) -> RunConfig:
    """The configuration of the recipe `name`, which records that name. Raises ConfigError where there is none."""
    if name not in RECIPES:
        raise ConfigError(unknown("recipe", name, RECIPES))
    return RECIPES[name].config


def select(patterns: Sequence[str]) -> list[Recipe]:
    """The recipes that match any of `patterns`, names or globs such as `r1_*`, each once.

    Raises:
        ConfigError: none is given, or one stands for nothing.
    """
    chosen = {}
    if not patterns:
        raise ConfigError("no recipe was named; give names or globs such as 'r1_*', which `fastcifar recipes` lists.")
    for pattern in patterns:
        found = {name: entry for name, entry in RECIPES.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(unknown("recipe", pattern, RECIPES))
        chosen |= found
    return list(chosen.values())
