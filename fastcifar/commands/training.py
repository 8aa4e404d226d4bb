"""Commands that train, or prepare for it; torch is imported only when one runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastcifar.checks import check_range
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.output import show
from fastcifar.recipes import select
from fastcifar.settings import Positional


@dataclass(frozen=True, kw_only=True)
class Configured:
    """The arguments of commands that start from a configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    config: Path | None = None
    """Start from the config.json of another run; further flags override it."""
    trust: bool = False
    """Execute the code that a file names as its architecture, if it is package.module:function; what --arch names needs
    no trust."""


@dataclass(frozen=True, kw_only=True)
class Train(Configured):
    """Train a network, into a run folder."""

    out: Path | None = None
    """Folder of the run, new or empty; ./runs/NAME-TIME by default."""
    resume: Path | None = None
    """Go on with the run in this folder, by its own settings; the only flags beside it are --epochs, to train for
    longer than planned, and --trust."""

    def __call__(self) -> None:
        from fastcifar.engine.run import train
        from fastcifar.runs.console import Console

        train(self.run, self.out, console=Console(), trust=self.trust)


@dataclass(frozen=True)
class Resume:
    """The command that `train --resume RUN` runs."""

    run: Path
    epochs: int | None = None
    trust: bool = False

    def __call__(self) -> None:
        from fastcifar.engine.run import resume
        from fastcifar.runs.console import Console

        resume(self.run, epochs=self.epochs, console=Console(), trust=self.trust)


@dataclass(frozen=True, kw_only=True)
class Plan(Configured):
    """Show the learning rate and the cost of a run, and what looks like a mistake, before anything trains."""

    out: Path = Path("plan.png")
    """A .png file for the picture of the learning rate."""

    def __call__(self) -> None:
        from fastcifar.diagnostics.plan import print_plan

        print_plan(self.run, self.out)


@dataclass(frozen=True, kw_only=True)
class Profile(Configured):
    """Train for a few steps, and show where their time goes."""

    steps: int = 16
    """Steps under the clock, rounded up to whole chunks of augmented images."""
    out: Path | None = None
    """Folder for the figures, the trace and the picture; ./profile-ARCH by default."""

    def __call__(self) -> None:
        check_range("steps", self.steps, 1, 10_000)
        from fastcifar.diagnostics.profile import print_profile

        print_profile(self.run, self.steps, self.out, self.trust)


@dataclass(frozen=True)
class Recipes:
    """List the recipes with their sources and claims, or describe some of them."""

    names: Positional[tuple[str, ...]] = ()
    """Names, or globs such as 'r1_*'; all in one table by default."""

    def __call__(self) -> None:
        from fastcifar.recipes.listing import description, overview

        show("\n\n".join(map(description, select(self.names))) if self.names else overview())


@dataclass(frozen=True)
class Reproduce:
    """Train recipes by several seeds, and compare the results with the claims; repeat the command to go on."""

    recipes: Positional[tuple[str, ...]]
    """Names, or globs such as 'r1_*'."""
    seeds: int = 1
    """Runs of each recipe."""
    epochs: int | None = None
    """In place of the recipes' own; the rows say so."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs and of results.json."""
    data_dir: Path | None = None
    """Folder to look for the data set in, before $FASTCIFAR_DATA and the user cache."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> None:
        chosen = select(self.recipes)
        from fastcifar.many.jobs import Overrides
        from fastcifar.many.reproduce import reproduce
        from fastcifar.runs.console import Console

        overrides = Overrides(self.epochs, data_dir=self.data_dir, engine=self.engine)
        reproduce(chosen, self.out, overrides, seeds=self.seeds, console=Console())
