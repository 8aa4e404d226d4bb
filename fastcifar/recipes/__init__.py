"""Recipes by name: zero-argument functions that return a `RunConfig`; the map is torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastcifar.errors import ConfigError, unknown
from fastcifar.registry import load

if TYPE_CHECKING:
    from fastcifar.config import RunConfig

RECIPES: dict[str, str] = {
    "quickstart": "fastcifar.recipes.own:quickstart",
}


def recipe(name: str) -> RunConfig:
    """The configuration of the recipe `name`, which carries that name. Raises ConfigError where there is none."""
    if name not in RECIPES:
        raise ConfigError(unknown("recipe", name, RECIPES))
    return replace(load(RECIPES[name])(), recipe=name)
