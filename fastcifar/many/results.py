"""Finished runs of recipes as rows in a file, and whether they meet the claim; free of torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastcifar.augment.policy import parse
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.recipes import RECIPES
from fastcifar.recipes.registry import difference
from fastcifar.runs.files import exists, reading, write_text
from fastcifar.serialization import build

SCHEMA = "fastcifar.results/1"
"""Marks these files among others beside them."""

ONE_RUN_SPREAD = 0.002
"""Standard deviation of a CIFAR-10 run's test accuracy by its seed, assumed where fewer than three runs exist."""

OF_THE_MACHINE = {field.name for field in fields(EngineConfig)}
OF_THE_MACHINE |= {"dataset", "data_dir", "loader", "chunk_size", "seed", "epochs"}
"""Settings that are decided when a run starts, or have a field of their own in a row."""


@dataclass(frozen=True)
class Row:
    """A finished run; accuracies are fractions, times seconds; None where a value does not apply."""

    recipe: str
    epochs: int
    full_length: bool
    """Whether `epochs` is the recipe's own number."""
    seed: int
    settings: dict[str, Any]
    """The recipe's settings at the time, other than the defaults."""
    test_accuracy: float
    averaged_test_accuracies: dict[str, float]
    watched_test_accuracy: float | None
    """The highest of any epoch, chosen on the test set."""
    seconds: float
    images_per_second: float
    device: str
    versions: dict[str, str]
    commit: str | None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.recipe, self.epochs, self.seed

    @property
    def average(self) -> float | None:
        return next(iter(self.averaged_test_accuracies.values()), None)


@dataclass(frozen=True)
class Summary:
    """The runs of one recipe, length and device, and how they compare with the claim."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def compared(self) -> list[float]:
        entry = RECIPES.get(self.first.recipe)
        if entry is None or entry.measure != "average":
            return [row.test_accuracy for row in self.rows]
        return [row.test_accuracy if row.average is None else row.average for row in self.rows]

    @property
    def met(self) -> bool | None:
        """Whether the mean is at least the claim less the spread; None where no claim covers such runs."""
        entry = RECIPES.get(self.first.recipe)
        if entry is None or entry.claim is None or entry.measure == "ensemble" or not self.first.full_length:
            return None
        spread = stdev(self.compared) if len(self.rows) >= 3 else ONE_RUN_SPREAD
        return mean(self.compared) >= entry.claim - spread


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Groups `rows` by recipe, length and device, in the recipes' order."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.recipe, row.epochs, row.device), []).append(row)
    order = {name: position for position, name in enumerate(RECIPES)}
    ranked = sorted(groups, key=lambda group: (order.get(group[0], len(order)), *group))
    return [Summary(tuple(sorted(groups[group], key=lambda row: row.seed))) for group in ranked]


def percent_and_spread(accuracies: list[float]) -> str:
    text = f"{100 * mean(accuracies):.2f}"
    return f"{text} ± {100 * stdev(accuracies):.2f}" if len(accuracies) > 1 else text


def recipe_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings of `config` that differ from the defaults, without the machine's, as JSON values."""
    changed = difference(resolved(config), resolved(RunConfig()))
    kept = {name: value for name, value in changed.items() if name not in OF_THE_MACHINE}
    return json.loads(json.dumps(kept, default=str))


def resolved(config: RunConfig) -> RunConfig:
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    parts = {name: part.resolved for name, part in parts.items() if hasattr(part, "resolved")}
    return replace(config, **parts, data=replace(config.data, augment=str(parse(config.data.augment))))


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a file; none where it is absent or another kind. Raises FastcifarError where it is damaged."""
    if not exists(path):
        return []
    with reading(path, "delete it, or mend it"):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            return []
        return [build(Row, row, path.name, complete=True) for row in build(list[dict], content.get("rows"), path.name)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file, with rows sorted by `key`. Raises FastcifarError where it cannot be written."""
    ordered = [dataclasses.asdict(row) for row in sorted(rows, key=lambda row: row.key)]
    write_text(path, json.dumps({"schema": SCHEMA, "rows": ordered}, indent=1) + "\n")
