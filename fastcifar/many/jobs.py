"""Planned runs of recipes, and checks of whether a folder already holds such a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fastcifar.config import EngineConfig, RunConfig
from fastcifar.engine.run import resume, train
from fastcifar.errors import ConfigError
from fastcifar.many.results import recipe_settings
from fastcifar.recipes import Recipe
from fastcifar.recipes.registry import derive
from fastcifar.runs.console import Console
from fastcifar.runs.files import exists
from fastcifar.runs.folder import Result, Run


@dataclass(frozen=True)
class Overrides:
    """Values that replace a recipe's own settings; None leaves them as they are."""

    epochs: int | None = None
    val_split: int | None = None
    data_dir: Path | None = None
    engine: EngineConfig | None = None

    def apply(self, config: RunConfig, seed: int) -> RunConfig:
        """Returns `config` with `seed` and the values given here."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        config = replace(config, engine=given.pop("engine", config.engine))
        return derive(config, seed=seed, **given)


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    config: RunConfig
    folder: Path

    @property
    def key(self) -> tuple[str, int, int]:
        return self.recipe.name, self.config.epochs, self.config.seed

    @property
    def started(self) -> bool:
        return exists(self.folder / "config.json")

    @property
    def result(self) -> Result | None:
        return Run(self.folder).result()

    def check_folder(self) -> None:
        """Raises ConfigError where the folder holds a run of another length, or of an earlier version of the recipe."""
        if not self.started:
            return
        found, wanted = Run(self.folder).config(), self.config.epochs
        check_settings(self, recipe_settings(found), str(self.folder))
        if found.epochs != wanted:
            raise ConfigError(
                f"{self.folder} holds a run of {found.epochs} epochs in place of {wanted}; choose another --out."
            )


def carry_out(config: RunConfig, folder: Path, console: Console) -> Result:
    """Trains the run of `config`, or resumes it where it was started."""
    if exists(folder / "config.json"):
        return resume(folder, console=console)
    return train(config, folder, console=console)


def check_settings(job: Job, kept: dict[str, object], place: str) -> None:
    """Raises ConfigError where the settings `kept` at `place` differ from those of the job's recipe."""
    wanted = recipe_settings(job.config)
    if kept != wanted:
        names = sorted(name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name))
        raise ConfigError(
            f"{place} holds a run of {job.recipe.name} as that recipe used to be ({', '.join(names)} changed); "
            "choose another --out, or remove the run."
        )
