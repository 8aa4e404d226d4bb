"""Runs recipes by seed, each into a folder of its own, and keeps what came out; what is done already is not done
again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastcifar.checks import check_range
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.engine.run import resume, train
from fastcifar.errors import ConfigError, DataError, FastcifarError
from fastcifar.many.results import (
    Row,
    Summary,
    percent_and_spread,
    read_rows,
    recipe_settings,
    summaries,
    write_rows,
)
from fastcifar.recipes import RECIPES, Recipe
from fastcifar.recipes.listing import aligned, claimed
from fastcifar.runs.console import Console, Silence
from fastcifar.runs.folder import Result, Run


@dataclass(frozen=True)
class Task:
    """One run of a recipe."""

    recipe: Recipe
    config: RunConfig
    folder: Path

    @property
    def full_length(self) -> bool:
        return self.config.epochs == self.recipe.config.epochs

    @property
    def key(self) -> tuple[str, int, int]:
        return self.recipe.name, self.config.epochs, self.config.seed


def reproduce(
    recipes: Iterable[Recipe],
    out: str | Path = "runs/reproduce",
    *,
    seeds: int = 1,
    epochs: int | None = None,
    data_dir: Path | None = None,
    engine: EngineConfig | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Trains each of `recipes` with the seeds 0 to `seeds` - 1, and writes `out`/results.json after every run.

    A run that has ended is kept, one that was interrupted goes on, and one that fails does not keep the others from
    running.

    Args:
        recipes: as `fastcifar.recipes.select` returns them.
        out: the runs go to `out`/NAME/seedS; where `epochs` shortens or lengthens them, to `out`/NAME-Eep/seedS.
        seeds: runs of each recipe; the first of all comes before the second of any.
        epochs: in place of the recipes' own.
        data_dir: folder to look for the data set in.
        engine: on what to compute.
        console: where to show progress; nowhere by default.

    Returns:
        The rows of these recipes, of this call and earlier ones.

    Raises:
        FastcifarError: a run failed, after all others were done; or the data set is missing, or `out` holds a run of
        another reading. Interrupted: it was stopped by a signal; the same call goes on.
    """
    out, console = Path(out), console or Silence()
    tasks = plan(recipes, out, seeds, epochs, data_dir, engine)
    done = {row.key: row for row in read_rows(out / "results.json")}
    for task in tasks:
        check_same_reading(task, done.get(task.key))
    failures = {}
    for number, task in enumerate(tasks, start=1):
        if task.key in done:
            continue
        console.note(f"{number} of {len(tasks)}: {task.folder}", prominent=True)
        try:
            done[task.key] = row_of(task, carry_out(task, console))
        except (DataError, ConfigError):
            raise
        except FastcifarError as error:
            failures[task.folder] = str(
                error
            )  # not the error, whose traceback would keep the run's tensors on the card
            console.note(f"{task.folder} failed: {error}", prominent=True)
        write_rows(out / "results.json", done.values())
    found = rows_of(tasks, done)
    if found:
        console.note(standing(summaries(found)))
    if failures:
        told = "; ".join(f"{folder}: {sentence.rstrip('.')}" for folder, sentence in failures.items())
        raise FastcifarError(f"{len(failures)} of {len(tasks)} runs failed ({told}); the others are done.")
    return found


def plan(
    recipes: Iterable[Recipe],
    out: Path,
    seeds: int,
    epochs: int | None,
    data_dir: Path | None,
    engine: EngineConfig | None,
) -> list[Task]:
    """The runs to do, seed by seed."""
    check_range("seeds", seeds, 1)
    tasks = []
    for seed in range(seeds):
        for entry in recipes:
            own = entry.config
            config = replace(
                own, seed=seed, epochs=own.epochs if epochs is None else epochs, engine=engine or own.engine
            )
            config = replace(config, data=replace(own.data, data_dir=data_dir or own.data.data_dir))
            name = entry.name if config.epochs == own.epochs else f"{entry.name}-{config.epochs}ep"
            tasks.append(Task(entry, config, out / name / f"seed{seed}"))
    return tasks


def check_same_reading(task: Task, row: Row | None) -> None:
    """Raises ConfigError where a row, or a run in the task's folder, was made by what the recipe used to be."""
    wanted = recipe_settings(task.config)
    if row is not None:
        kept, place = row.settings, f"results.json beside {task.folder.parent}"
    elif (task.folder / "config.json").exists():
        kept, place = recipe_settings(Run.open(task.folder).config()), str(task.folder)
    else:
        return
    if kept != wanted:
        names = sorted(name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name))
        raise ConfigError(
            f"{place} holds a run of {task.recipe.name} as that recipe used to be ({', '.join(names)} changed); "
            "choose another --out, or remove the run."
        )


def carry_out(task: Task, console: Console) -> Result:
    """Trains, or goes on; what earlier runs compiled and allocated is let go first, since compiling the same code
    too often is refused.
    """
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (task.folder / "config.json").exists():
        return resume(task.folder, console=console)
    return train(task.config, task.folder, console=console)


def row_of(task: Task, result: Result) -> Row:
    name, epochs, seed = task.key
    return Row(
        recipe=name,
        epochs=epochs,
        full_length=task.full_length,
        seed=seed,
        settings=recipe_settings(task.config),
        test_accuracy=result.test_accuracy,
        averaged_test_accuracies=result.averaged_test_accuracies,
        watched_test_accuracy=result.watched_test_accuracy,
        seconds=result.seconds,
        images_per_second=result.images_per_second,
        device=result.device,
        versions=result.versions,
        commit=result.commit,
    )


def rows_of(tasks: list[Task], done: dict[tuple[str, int, int], Row]) -> list[Row]:
    """The rows of the tasks' recipes and lengths, whatever their seeds."""
    wanted = {task.key[:2] for task in tasks}
    return [row for row in done.values() if row.key[:2] in wanted]


def standing(found: list[Summary]) -> str:
    """Claims and what was measured, in percent, as a table for the console."""
    rows = [("recipe", "epochs", "claim", "n", "weights", "average", "")]
    rows += [line(summary) for summary in found]
    return aligned(rows)


def line(summary: Summary) -> tuple[str, ...]:
    row, entry = summary.first, RECIPES[summary.first.recipe]
    averages = [row.average for row in summary.rows if row.average is not None]
    return (
        row.recipe,
        str(row.epochs),
        claimed(entry),
        str(len(summary.rows)),
        percent_and_spread([row.test_accuracy for row in summary.rows]),
        percent_and_spread(averages) if averages else "",
        {True: "met", False: "not met", None: ""}[summary.met],
    )
