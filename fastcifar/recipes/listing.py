"""Recipes as text for the command line; free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastcifar.config import ModelConfig, RunConfig
from fastcifar.models import ARCHITECTURES
from fastcifar.output import printable
from fastcifar.recipes.registry import RECIPES, Recipe, difference


def overview() -> str:
    """A table of all recipes: name, source, claim in percent, and the parent with the changes."""
    rows = [("recipe", "source", "claim", "made of")]
    rows += [(entry.name, entry.source, claimed(entry), made_of(entry)) for entry in RECIPES.values()]
    return aligned(rows)


def description(entry: Recipe) -> str:
    """The text on one recipe: its purpose, and every setting that is not the default."""
    changed = difference(entry.config, RunConfig())
    facts = {
        "source": entry.source,
        "claim": claimed(entry),
        "made of": made_of(entry) if entry.parent else "the defaults",
        "initial weights": INITIAL[weight_init(entry.config.model)],
    }
    lines = [entry.name, "", entry.about or f"{entry.parent} with this one change.", ""]
    lines += [
        aligned(facts.items()),
        "",
        "What differs from the defaults:",
        aligned((name, written(changed[name])) for name in changed),
    ]
    return "\n".join([*lines, "", f"fastcifar train --recipe {entry.name}"])


INITIAL = {"he": "by He's rule", "pytorch": "PyTorch's own, as in the code that the report builds on"}


def weight_init(model: ModelConfig) -> str:
    """The rule by which the network of a recipe begins: "he" or "pytorch"."""
    return model.weight_init or ARCHITECTURES[model.arch].preset.get("weight_init", "he")


def claimed(entry: Recipe) -> str:
    """The claim in percent, and its measure where that is not the weights."""
    if entry.claim is None:
        return ""
    return f"{100 * entry.claim:.2f}" + ("" if entry.measure == "weights" else f" ({entry.measure})")


def made_of(entry: Recipe) -> str:
    changed = " ".join(f"{name}={written(value)}" for name, value in entry.changes.items())
    return f"{entry.parent}: {changed}" if entry.parent else changed


def written(value: Any) -> str:
    """Formats a setting's value, much as a flag takes it."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else "default" if value is None else str(value)


def aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
