"""`fastcifar ensemble`: what runs come to together, from their folders alone."""

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
from fastcifar.runs.ensembles import EnsembleReport, Member, Standing, write_report
from fastcifar.runs.files import writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import StoredNetwork, TrainedNetwork, check_agreement, read_network


@dataclass(frozen=True, eq=False)
class Answers:
    """What members made of a labelled set, on the CPU."""

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
        """The accuracy of each member."""
        return [share(predicted == self.labels) for predicted in self.predictions]

    def of(self, members: Sequence[int]) -> Answers:
        return Answers(self.probabilities[list(members)], self.labels)


def share(chosen: Tensor) -> float:
    """The share of a bool (N,) that is true."""
    return int(chosen.sum()) / len(chosen)


def evaluate_ensemble(
    runs: Sequence[Path],
    out: Path,
    *,
    data_dir: Path | None = None,
    which: str | None = None,
    tta: TTA = "none",
    trust: bool = False,
) -> EnsembleReport:
    """Lets `runs` vote on their test set, and writes ensemble.json into `out`.

    A run that keeps snapshots has a vote for each of them, which makes one such run an ensemble (Huang et al. 2017,
    arXiv:1704.00109). Where all of them set the same images apart for validation, members are chosen on those, before
    the test set is opened.

    Args:
        runs: their folders, with two members or more; each preprocesses the images as it was trained to.
        out: folder of the ensemble, made where it is not there.
        data_dir: where to look for the data set; the first run's own place by default.
        which: of each run's weights; by default its snapshots where it keeps any, else as `runs.network.load_network`
        has it. tta: test-time augmentation. trust: whether code that comes with a run may be executed.

    Raises:
        FastcifarError: a run cannot be used, the runs differ in data set, classes or image size, or the file cannot be
        written.
    """
    check_distinct(runs)
    configs = [Run.open(path).config() for path in runs]
    name = common_dataset(runs, configs)
    data_dir = data_dir or configs[0].data.data_dir
    members = [member for path in runs for member in classifiers(read_network(path, trust=trust), which)]
    if len(members) < 2:
        raise ConfigError(
            "an ensemble takes two members or more; name the folders of more runs, or one that was trained with "
            "--snapshots."
        )
    networks = [network for member in members for network in member.networks]
    check_agreement(networks)
    obstacle, validation = split_obstacle(configs), None
    if obstacle is None:
        train = load_dataset(name, "train", data_dir)
        check_dataset(networks[0], train, name)
        validation = ask(members, *validation_set(configs[0], train), tta)
    chosen = select(validation.probabilities, validation.labels).members if validation else None
    sizes = (
        [choice.members for choice in best_of_each_size(validation.probabilities, validation.labels)]
        if validation
        else []
    )
    test_set = load_dataset(name, "test", data_dir)
    check_dataset(networks[0], test_set, name)
    test = ask(members, test_set.images, test_set.labels, tta)
    report = EnsembleReport(
        dataset=name,
        images=len(test.labels),
        tta=tta,
        members=describe(networks, out, test, validation),
        whole=standing(range(len(members)), test, validation),
        chosen=standing(chosen, test, validation) if chosen else None,
        not_chosen=obstacle,
        sizes=tuple(standing(choice, test, validation) for choice in sizes),
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    return report


def check_distinct(runs: Sequence[Path]) -> None:
    """Raises ConfigError where one stands there twice."""
    seen: set[str] = set()
    for path in runs:
        if (real := os.path.realpath(path)) in seen:
            raise ConfigError(f"{path} is named twice; each run votes once.")
        seen.add(real)


def classifiers(run: StoredNetwork, which: str | None) -> list[Classifier]:
    """The members that a run makes, on a GPU where there is one. Raises FastcifarError as `StoredNetwork.load`."""
    device = resolve_device("auto")
    names = [which] if which else run.snapshots or [None]
    networks = [run.load(device, name) for name in names]
    return [Classifier((network,), device, precision_of([network], device)) for network in networks]


def common_dataset(runs: Sequence[Path], configs: Sequence[RunConfig]) -> str:
    """The data set of all runs. Raises ConfigError where they differ in it."""
    first = configs[0].data.dataset
    for path, config in zip(runs, configs, strict=True):
        if config.data.dataset != first:
            raise ConfigError(
                f"{path} was trained on {config.data.dataset} and {runs[0]} on {first}; give runs on the same data set."
            )
    return first


def ask(members: Sequence[Classifier], images: Tensor, labels: Tensor, tta: TTA) -> Answers:
    """Images uint8 (N, H, W, 3) and labels int64 (N,)."""
    return Answers(torch.stack([member.probabilities(images, tta) for member in members]), labels)


def describe(
    networks: Sequence[TrainedNetwork], out: Path, test: Answers, validation: Answers | None
) -> tuple[Member, ...]:
    """Each member by itself."""
    validated = validation.accuracies if validation else [None] * len(networks)
    rows = zip(networks, validated, test.accuracies, strict=True)
    return tuple(Member(place_of(one.path, out), one.weights, known, tested) for one, known, tested in rows)


def place_of(run: Path, out: Path) -> Path:
    """`run` from the folder `out` where it lies within, so that both can move together; else from the root."""
    run, out = run.resolve(), out.resolve()
    return run.relative_to(out) if run.is_relative_to(out) else run


def standing(members: Sequence[int], test: Answers, validation: Answers | None) -> Standing:
    """What `members` come to together."""
    voters, known = test.of(members), validation.of(members) if validation else None
    hard, tied = hard_vote(voters.probabilities)
    right = soft_vote(voters.probabilities) == voters.labels
    return Standing(
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


def lines_of(report: EnsembleReport) -> Iterator[str]:
    """What the person at the keyboard reads."""
    rows = [("member", "weights", "validation", "test", "run")]
    for number, one in enumerate(report.members):
        rows.append(
            (str(number), one.weights, percent(one.validation_accuracy), percent(one.test_accuracy), str(one.run))
        )
    yield aligned(rows)
    yield ""
    columns: list[tuple[str, Callable[[Standing], str]]] = [
        ("validation", lambda one: percent(one.validation_accuracy)),
        ("soft vote", lambda one: percent(one.soft_accuracy)),
        ("hard vote", lambda one: percent(one.hard_accuracy)),
        ("ties", lambda one: str(one.ties)),
        ("over mean", lambda one: points(one.soft_accuracy - one.mean_member)),
        ("over best", lambda one: points(one.soft_accuracy - one.best_member)),
        ("disagree", lambda one: percent(one.disagreement)),
        ("Q", lambda one: "" if one.q_statistic is None else f"{one.q_statistic:.3f}"),
        ("members", lambda one: ",".join(map(str, one.members))),
    ]
    named = {f"best {len(one.members)}": one for one in report.sizes} | {"all": report.whole}
    named |= {"chosen": report.chosen} if report.chosen else {}
    yield aligned(
        [
            ("", *(name for name, _ in columns)),
            *((name, *(cell(one) for _, cell in columns)) for name, one in named.items()),
        ]
    )
    yield ""
    low, high = (f"{100 * bound:.2f}" for bound in report.best.soft_interval)
    how = (
        f"{len(report.best.members)} chosen on the validation split" if report.chosen else f"all {len(report.members)}"
    )
    yield (
        f"test accuracy {percent(report.best.soft_accuracy)} ({low} to {high}) "
        f"of {report.images:,} images, by the soft vote of {how}"
    )
    if report.not_chosen:
        yield f"No members were chosen, since {report.not_chosen}: train with one --val-split to choose by."


def points(difference: float) -> str:
    """A difference of two accuracies."""
    return f"{100 * difference:+.2f}"
