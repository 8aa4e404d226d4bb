"""The folder of an ensemble, with its members and votes in ensemble.json; free of torch.

ensemble.json      the members, and their votes
seedS/, seedS.log  the runs that were trained for it, and their output
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastcifar.errors import ConfigError
from fastcifar.runs.files import exists, read_json, write_text

FILE = "ensemble.json"
AGAIN = "let `fastcifar ensemble` write it again"

SplitObstacle = Literal["no-split", "different-splits"]
"""Why the runs share no validation images to choose members on."""


@dataclass(frozen=True)
class Member:
    """A run, or a snapshot of one; accuracies are fractions."""

    run: Path
    """The run's folder, relative to the ensemble's where it lies within it."""
    weights: str
    """Name of the weights that vote."""
    validation_accuracy: float | None
    """None without a validation split that all members share."""
    test_accuracy: float


@dataclass(frozen=True)
class Vote:
    """The vote of some members, on the test set unless said otherwise; accuracies and shares are fractions."""

    members: tuple[int, ...]
    """Indices among the ensemble's members."""
    validation_accuracy: float | None
    """Accuracy of the soft vote on the validation split."""
    soft_accuracy: float
    """Accuracy of the class of the greatest mean probability."""
    soft_interval: tuple[float, float]
    """The 95% Wilson interval."""
    hard_accuracy: float
    """Accuracy of the class that most members choose."""
    ties: int
    """Images for which several classes had equally many votes; the summed probability decided."""
    mean_member: float
    """Mean accuracy of these members."""
    best_member: float
    """Accuracy of the best of these members, on the test set."""
    disagreement: float | None
    """Share of images to which two members give different classes, mean over pairs; None for one member."""
    q_statistic: float | None
    """Yule's Q of their correct answers, mean over pairs; None where it is not defined."""


@dataclass(frozen=True)
class EnsembleReport:
    """The content of ensemble.json."""

    dataset: str
    images: int
    tta: str
    members: tuple[Member, ...]
    whole: Vote
    chosen: Vote | None
    """The vote of those chosen greedily on the validation split; None where they share no such split."""
    not_chosen: SplitObstacle | None
    sizes: tuple[Vote, ...]
    """For each number of members, the vote of those that are best on the validation split."""

    @property
    def best(self) -> Vote:
        """The vote of the chosen members, or else of all."""
        return self.chosen or self.whole


def write_report(folder: Path, report: EnsembleReport) -> None:
    write_text(folder / FILE, json.dumps(dataclasses.asdict(report), indent=2, default=str) + "\n")


def read_report(folder: Path) -> EnsembleReport:
    """Reads ensemble.json. Raises FastcifarError where it is missing or damaged."""
    return read_json(folder / FILE, EnsembleReport, AGAIN)


def is_ensemble(folder: Path) -> bool:
    return exists(folder / FILE)


def voters(folder: Path) -> list[tuple[Path, str]]:
    """Returns folder and weights of each voting run. Raises FastcifarError as `read_report`, or where a run is gone."""
    report = read_report(folder)
    members = report.best.members
    if not members:
        raise ConfigError(f"{folder / FILE} names no member that votes; {AGAIN}.")
    if bad := [place for place in members if not 0 <= place < len(report.members)]:
        raise ConfigError(f"{folder / FILE} names member {bad[0]} of {len(report.members)}; {AGAIN}.")
    chosen = [(folder / report.members[place].run, report.members[place].weights) for place in members]
    if gone := [run for run, _ in chosen if not exists(run / "config.json")]:
        raise ConfigError(
            f"{folder}'s member {gone[0]} is no longer there; put it back, or let `fastcifar ensemble` vote without it."
        )
    return chosen
