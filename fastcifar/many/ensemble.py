"""`fastcifar ensemble`: lets runs vote together, given their folders alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.config import RunConfig
from fastcifar.data.sources import load_dataset
from fastcifar.device import resolve_device
from fastcifar.errors import ConfigError
from fastcifar.inference import TTA
from fastcifar.inference.classifier import Classifier, precision_of
from fastcifar.inference.evaluate import check_dataset, split_obstacle, validation_set
from fastcifar.inference.metrics import wilson_interval
from fastcifar.many.votes import best_of_each_size, disagreement, hard_vote, q_statistic, select, soft_vote
from fastcifar.recipes.listing import aligned
from fastcifar.runs.console import percent
from fastcifar.runs.ensembles import EnsembleReport, Member, SplitObstacle, Vote, write_report
from fastcifar.runs.files import writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import LoadOptions, TrainedNetwork, check_agreement, read_network

SPLIT_OBSTACLES: dict[SplitObstacle, str] = {
    "no-split": "not all runs set images apart for validation",
    "different-splits": "the runs set different images apart for validation",
}
"""Reasons why no members were chosen, as the console words them."""


@dataclass(frozen=True, eq=False)
class MemberAnswers:
    """The members' probabilities for a labelled set, on the CPU."""

    probabilities: Tensor
    """float64 (M, N, C)."""
    labels: Tensor
    """int64 (N,)."""

    @property
    def predictions(self) -> Tensor:
        """int64 (M, N)."""
        return self.probabilities.argmax(dim=2)

    @property
    def accuracies(self) -> list[float]:
        return [share(predicted == self.labels) for predicted in self.predictions]

    def of(self, members: Sequence[int]) -> MemberAnswers:
        return MemberAnswers(self.probabilities[list(members)], self.labels)


def share(chosen: Tensor) -> float:
    return int(chosen.sum()) / len(chosen)


def evaluate_ensemble(
    runs: Sequence[Path], out: Path, options: LoadOptions, *, data_dir: Path | None = None, tta: TTA = "none"
) -> EnsembleReport:
    """Lets `runs`, with at least two members, vote on their test set, and writes ensemble.json into the folder `out`.

    Each network preprocesses the images as it was trained to. A run that keeps snapshots has a vote for each of them,
    so one such run is an ensemble (Huang et al. 2017, arXiv:1704.00109); `options` may name other weights. Where all
    runs set the same images apart for validation, members are chosen on those, before the test set is opened. The data
    set is looked for in `data_dir`, by default the first run's.

    Raises FastcifarError where a run cannot be used, the runs differ in data set, classes or image size, or the file
    cannot be written.
    """
    check_distinct(runs)
    configs = [Run.open(path).config() for path in runs]
    name = common_dataset(runs, configs)
    data_dir = data_dir or configs[0].data.data_dir
    device = resolve_device("auto")
    networks = [network for path in runs for network in load_members(path, device, options)]
    if len(networks) < 2:
        raise ConfigError(
            "an ensemble takes two members or more; name the folders of more runs, or one that was trained with "
            "--snapshots."
        )
    check_agreement(networks)
    members = [Classifier((network,), device, precision_of([network], device)) for network in networks]
    obstacle, known, chosen, sizes = split_obstacle(configs), None, None, ()
    if obstacle is None:
        train = load_dataset(name, "train", data_dir)
        check_dataset(networks[0], train, name)
        known = ask(members, *validation_set(configs[0], train), tta)
        chosen = select(known.probabilities, known.labels)
        sizes = best_of_each_size(known.probabilities, known.labels)
    test_set = load_dataset(name, "test", data_dir)
    check_dataset(networks[0], test_set, name)
    test = ask(members, test_set.images, test_set.labels, tta)
    report = EnsembleReport(
        dataset=name,
        images=len(test.labels),
        tta=tta,
        members=describe(networks, out, test, known),
        whole=vote(range(len(members)), test, known),
        chosen=vote(chosen.members, test, known) if chosen else None,
        not_chosen=obstacle,
        sizes=tuple(vote(subset.members, test, known) for subset in sizes),
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    return report


def check_distinct(runs: Sequence[Path]) -> None:
    """Raises ConfigError where a run is named twice."""
    places = [os.path.realpath(path) for path in runs]
    for number, path in enumerate(runs):
        if places[number] in places[:number]:
            raise ConfigError(f"{path} is named twice; each run votes once.")


def load_members(path: Path, device: torch.device, options: LoadOptions) -> list[TrainedNetwork]:
    """Loads the members that the run at `path` contributes."""
    run = read_network(path, options)
    names = [options.weights] if options.weights else run.snapshots or [None]
    return [run.load(device, name) for name in names]


def common_dataset(runs: Sequence[Path], configs: Sequence[RunConfig]) -> str:
    """Returns the data set of all runs. Raises ConfigError where they differ in it."""
    first = configs[0].data.dataset
    for path, config in zip(runs, configs, strict=True):
        if config.data.dataset != first:
            raise ConfigError(
                f"{path} was trained on {config.data.dataset} and {runs[0]} on {first}; give runs on the same data set."
            )
    return first


def ask(members: Sequence[Classifier], images: Tensor, labels: Tensor, tta: TTA) -> MemberAnswers:
    """Asks every member about images uint8 (N, H, W, 3) with labels int64 (N,)."""
    return MemberAnswers(torch.stack([member.probabilities(images, tta) for member in members]), labels)


def describe(
    networks: Sequence[TrainedNetwork], out: Path, test: MemberAnswers, validation: MemberAnswers | None
) -> tuple[Member, ...]:
    validated = validation.accuracies if validation else [None] * len(networks)
    rows = zip(networks, validated, test.accuracies, strict=True)
    return tuple(Member(place_of(one.path, out), one.weights, known, tested) for one, known, tested in rows)


def place_of(run: Path, out: Path) -> Path:
    """Makes `run` relative to `out` where it lies within, so that both can move together; else absolute."""
    run, out = run.resolve(), out.resolve()
    return run.relative_to(out) if run.is_relative_to(out) else run


def vote(members: Sequence[int], test: MemberAnswers, validation: MemberAnswers | None) -> Vote:
    voters, known = test.of(members), validation.of(members) if validation else None
    hard, tied = hard_vote(voters.probabilities)
    right = soft_vote(voters.probabilities) == voters.labels
    return Vote(
        members=tuple(members),
        validation_accuracy=share(soft_vote(known.probabilities) == known.labels) if known else None,
        soft_accuracy=share(right),
        soft_interval=wilson_interval(int(right.sum()), len(right)),
        hard_accuracy=share(hard == voters.labels),
        ties=int(tied.sum()),
        mean_member=sum(voters.accuracies) / len(members),
        best_member=max(voters.accuracies),
        disagreement=disagreement(voters.predictions),
        q_statistic=q_statistic(voters.predictions == voters.labels),
    )


COLUMNS: dict[str, Callable[[Vote], str]] = {
    "validation": lambda vote: percent(vote.validation_accuracy),
    "soft vote": lambda vote: percent(vote.soft_accuracy),
    "hard vote": lambda vote: percent(vote.hard_accuracy),
    "ties": lambda vote: str(vote.ties),
    "over mean": lambda vote: f"{100 * (vote.soft_accuracy - vote.mean_member):+.2f}",
    "over best": lambda vote: f"{100 * (vote.soft_accuracy - vote.best_member):+.2f}",
    "disagree": lambda vote: percent(vote.disagreement),
    "Q": lambda vote: "" if vote.q_statistic is None else f"{vote.q_statistic:.3f}",
    "members": lambda vote: ",".join(map(str, vote.members)),
}


def lines_of(report: EnsembleReport) -> Iterator[str]:
    rows = [("member", "weights", "validation", "test", "run")]
    for number, one in enumerate(report.members):
        accuracies = percent(one.validation_accuracy), percent(one.test_accuracy)
        rows.append((str(number), one.weights, *accuracies, str(one.run)))
    yield aligned(rows)
    yield ""
    votes = {f"best {len(vote.members)}": vote for vote in report.sizes} | {"all": report.whole}
    votes |= {"chosen": report.chosen} if report.chosen else {}
    yield aligned(
        [("", *COLUMNS), *((name, *(cell(vote) for cell in COLUMNS.values())) for name, vote in votes.items())]
    )
    yield ""
    best, (low, high) = report.best, (f"{100 * bound:.2f}" for bound in report.best.soft_interval)
    how = f"{len(best.members)} chosen on the validation split" if report.chosen else f"all {len(report.members)}"
    yield (
        f"test accuracy {percent(best.soft_accuracy)} ({low} to {high}) of {report.images:,} images, "
        f"by the soft vote of {how}"
    )
    if report.not_chosen:
        why = SPLIT_OBSTACLES[report.not_chosen]
        yield f"No members were chosen, since {why}: train with one --val-split to choose by."
