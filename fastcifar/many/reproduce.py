"""`fastcifar reproduce`: trains recipes with several seeds, and compares the results with the claims."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastcifar.checks import check_range
from fastcifar.errors import ConfigError, DataError, FastcifarError
from fastcifar.many.ensemble import evaluate_ensemble
from fastcifar.many.jobs import Job, Overrides, carry_out, check_settings
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
from fastcifar.runs.folder import Result
from fastcifar.runs.network import DEFAULT


def reproduce(
    recipes: Sequence[Recipe],
    out: Path,
    overrides: Overrides,
    *,
    seeds: int = 1,
    console: Console | None = None,
) -> list[Row]:
    """Trains each of `recipes` with the seeds 0 to `seeds` - 1, and writes `out`/results.json after every run.

    Finished runs are kept, interrupted ones are resumed, and one that fails does not stop the others. The first seed of
    every recipe comes before the second of any. The runs go to `out`/NAME/seedS, or to `out`/NAME-Eep/seedS where the
    epochs are not the recipe's own. Where a recipe's claim is an ensemble's, those runs vote at the end that the
    validation split chooses, as in `fastcifar ensemble`.

    Returns the rows of these recipes, from this call and earlier ones.

    Raises FastcifarError where a run failed, after all others were done, the data set is missing, or `out` holds a run
    of an earlier version of a recipe; Interrupted where a signal stopped it.
    """
    check_range("seeds", seeds, 1)
    console = console or Silence()
    jobs = [job_of(recipe, seed, out, overrides) for seed in range(seeds) for recipe in recipes]
    done = {row.key: row for row in read_rows(out / "results.json")}
    for job in jobs:
        if row := done.get(job.key):
            check_settings(job, row.settings, f"results.json beside {job.folder.parent}")
        else:
            job.check_folder()
    failures = train_all(jobs, done, out / "results.json", console)
    for recipe in recipes:
        if recipe.measure == "ensemble":
            let_vote([job for job in jobs if job.recipe is recipe and job.key in done], done)
            write_rows(out / "results.json", done.values())
    wanted = {job.key[:2] for job in jobs}
    found = [row for row in done.values() if row.key[:2] in wanted]
    if found:
        console.note(claims_table(summaries(found)))
    if failures:
        told = "; ".join(f"{folder}: {sentence.rstrip('.')}" for folder, sentence in failures.items())
        others = "the others are done" if len(failures) < len(jobs) else "mend that, and repeat the command"
        raise FastcifarError(f"{len(failures)} of {len(jobs)} runs failed ({told}); {others}.")
    return found


Key = tuple[str, int, int]


def train_all(jobs: Sequence[Job], done: dict[Key, Row], path: Path, console: Console) -> dict[Path, str]:
    """Carries out the jobs without a row in `done`, and adds their rows; returns what failed, by folder."""
    failures = {}
    for number, job in enumerate(jobs, start=1):
        if job.key in done:
            continue
        console.note(f"{number} of {len(jobs)}: {job.folder}", prominent=True)
        free_caches()
        try:
            done[job.key] = row_of(job, carry_out(job.config, job.folder, console))
        except (DataError, ConfigError):
            raise
        except FastcifarError as error:
            # The text alone is kept: the error's traceback would keep the run's tensors on the GPU.
            failures[job.folder] = str(error)
            console.note(f"{job.folder} failed: {error}", prominent=True)
        write_rows(path, done.values())
    return failures


def let_vote(jobs: Sequence[Job], done: dict[Key, Row]) -> None:
    """Puts the vote of finished runs of one recipe, two or more that are still there, into the row of the last seed."""
    if len(jobs) < 2 or done[jobs[-1].key].vote is not None or not all(job.started for job in jobs):
        return
    report = evaluate_ensemble([job.folder for job in jobs], jobs[0].folder.parent, DEFAULT)
    done[jobs[-1].key] = replace(done[jobs[-1].key], vote=report.best.soft_accuracy)


def job_of(recipe: Recipe, seed: int, out: Path, overrides: Overrides) -> Job:
    config = overrides.apply(recipe.config, seed)
    name = recipe.name if config.epochs == recipe.config.epochs else f"{recipe.name}-{config.epochs}ep"
    return Job(recipe, config, out / name / f"seed{seed}")


def free_caches() -> None:
    """Frees what earlier runs compiled and allocated; torch refuses to compile the same code too often."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row_of(job: Job, result: Result) -> Row:
    name, epochs, seed = job.key
    return Row(
        recipe=name,
        epochs=epochs,
        full_length=epochs == job.recipe.config.epochs,
        seed=seed,
        settings=recipe_settings(job.config),
        test_accuracy=result.test_accuracy,
        averaged_test_accuracies=result.averaged_test_accuracies,
        watched_test_accuracy=result.watched_test_accuracy,
        seconds=result.seconds,
        images_per_second=result.images_per_second,
        device=result.device,
        versions=result.versions,
        commit=result.commit,
    )


def claims_table(found: list[Summary]) -> str:
    header = ("recipe", "epochs", "claim", "n", "weights", "average", "vote", "")
    return aligned([header, *map(claim_row, found)])


def claim_row(summary: Summary) -> tuple[str, ...]:
    row = summary.first
    averages = [row.average for row in summary.rows if row.average is not None]
    return (
        row.recipe,
        str(row.epochs),
        claimed(RECIPES[row.recipe]),
        str(len(summary.rows)),
        percent_and_spread([row.test_accuracy for row in summary.rows]),
        percent_and_spread(averages) if averages else "",
        percent_and_spread(summary.compared) if summary.rows[-1].vote is not None else "",
        {True: "met", False: "not met", None: ""}[summary.met],
    )
