"""The results of an evaluation: as values, as lines, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from fastcifar.checks import given
from fastcifar.data.image_set import ImageSet
from fastcifar.inference import TTA
from fastcifar.inference.metrics import Bin, ClassScore, reliability
from fastcifar.output import complain
from fastcifar.plots import draw, plot_confusion, plot_images, plot_reliability, shortened
from fastcifar.runs.console import percent
from fastcifar.runs.files import write_text, writing

MISTAKES = 24
"""Number of mistakes in the picture."""
CAPTION = 12
"""Letters of a class's name in a caption of that picture."""


@dataclass(frozen=True)
class Score:
    """How a set of weights performs on a labelled set."""

    images: int
    accuracy: float
    interval: tuple[float, float]
    """The 95% Wilson interval."""
    loss: float
    """Mean cross-entropy."""
    seconds: float
    """Seconds for all images, from the host's memory to logits there, once warmed up."""


@dataclass(frozen=True)
class Calibration:
    """How reliable the confidence is, before and after all logits are divided by one temperature."""

    error: float
    """Expected calibration error, as a fraction."""
    temperature: float
    """The likeliest temperature: below 1 for an underconfident network, above 1 for an overconfident one."""
    fitted_on: Literal["validation", "test"]
    """Without a validation split it is the test set itself, which flatters what follows."""
    scaled_error: float
    scaled_loss: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Speed:
    """Time from bytes to logits, both on the device, in plain calls that are waited for one by one."""

    batch_size: int
    latency_seconds: float
    """Median time of a call."""
    images_per_second: float


@dataclass(frozen=True)
class Report:
    """The content of evaluation.json."""

    arch: str
    dataset: str
    same_images: bool | None
    """Whether these are the test images that the run had; None where the run does not know them."""
    device: str
    precision: str
    weights: dict[str, Score]
    """Test scores, without augmentation, of a run's sets of weights, or an ensemble's voters and "ensemble"."""
    chosen: str
    """The weights that all fields below are about."""
    tta: TTA
    augmented: Score | None
    """Score with test-time augmentation, where asked for; the fields below are then augmented too."""
    classes: tuple[ClassScore, ...]
    confusion: list[list[int]] | None
    """A row for each label, a column for each prediction; None for very many classes."""
    calibration: Calibration
    sets: dict[str, Score]
    """Scores on further test sets, by path."""
    speed: tuple[Speed, ...]

    @property
    def score(self) -> Score:
        """The score of the chosen weights, augmented where asked for."""
        return self.augmented or self.weights[self.chosen]


def lines_of(report: Report, per_class: bool = False) -> Iterator[str]:
    wide = max(10, *map(len, report.weights))
    if report.same_images is False:
        yield f"{'images':{wide}}  not the test images that the run had: {report.dataset} has changed since"
    for name, score in report.weights.items():
        yield f"{name:{wide}}  test accuracy {described(score)}"
    if report.augmented:
        plain, augmented = report.weights[report.chosen], report.augmented
        gain, cost = 100 * (augmented.accuracy - plain.accuracy), augmented.seconds / plain.seconds
        yield f"{report.tta:{wide}}  test accuracy {described(augmented)}"
        times = f"in {augmented.seconds:.2f} s for {plain.seconds:.2f} s ({cost:.1f} times)"
        yield f"{'':{wide}}  {gain:+.2f} points over {report.chosen}, {times}"
    for path, score in report.sets.items():
        yield f"{path}  accuracy {described(score)}, {score.images:,} images"
    calibration = report.calibration
    yield (
        f"{'calibrated':{wide}}  error {percent(calibration.error)}; {percent(calibration.scaled_error)} at "
        f"temperature {calibration.temperature:.3f}, fitted on the {calibration.fitted_on} set"
    )
    if per_class:
        width = max(len(one.name) for one in report.classes)
        yield f"{'class':{width}}  images   recall  precision"
        for one in report.classes:
            yield f"{one.name:{width}}  {one.images:6,}  {percent(one.recall):>7}  {percent(one.precision):>9}"
    yield f"{'precision':{wide}}  {report.precision}, on {report.device}"
    for speed in report.speed:
        latency, rate = 1000 * speed.latency_seconds, speed.images_per_second
        yield f"batch {speed.batch_size:>4}  {latency:9.3f} ms  {rate:12,.0f} img/s"


def described(score: Score) -> str:
    low, high = (f"{100 * bound:.2f}" for bound in score.interval)
    return f"{percent(score.accuracy)} ({low} to {high})  loss {score.loss:.4f}"


def write_report(folder: Path, report: Report, logits: Tensor, test: ImageSet) -> None:
    """Writes evaluation.json, reliability.png and, where they have something to show, confusion.png and mistakes.png.

    `folder` is created where it does not exist; `logits` are float32 (N, classes) for the images of the labelled set
    `test`. A picture that cannot be drawn is missing, which stderr reports.
    """
    calibration = report.calibration
    scaled = reliability(logits, test.labels, calibration.temperature)
    series = {"as it is": points(calibration.bins), f"at temperature {calibration.temperature:.3f}": points(scaled)}
    worst, captions = worst_mistakes(logits, test.labels, test.classes)
    pictures = {
        "confusion.png": (plot_confusion, np.array(report.confusion), test.classes),
        "reliability.png": (plot_reliability, series, [one.images for one in calibration.bins]),
        "mistakes.png": (plot_images, test.images[worst].numpy()[None], captions),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evaluation.json", json.dumps(asdict(report), indent=2) + "\n")
        for name in pictures:
            (folder / name).unlink(missing_ok=True)
    if not captions:
        del pictures["mistakes.png"]
    if report.confusion is None:
        del pictures["confusion.png"]
    for name, (plot, *arguments) in pictures.items():
        if failure := draw(folder / name, plot, *arguments):
            complain(failure)


def points(bins: Sequence[Bin]) -> list[tuple[float, float, float]]:
    """Returns confidence, accuracy and share of the images for every bin that is not empty."""
    total = sum(one.images for one in bins)
    return [(given(one.confidence), given(one.accuracy), one.images / total) for one in bins if one.images]


def worst_mistakes(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Returns the wrong images that give their label the least probability, worst first: int64 (n,), and captions."""
    shares = logits.double().log_softmax(dim=1)
    predicted = logits.argmax(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[shares[wrong, labels[wrong]].argsort(stable=True)[:MISTAKES]]
    captions = []
    for image in worst.tolist():
        pair = int(labels[image]), int(predicted[image])
        label, mistaken = (shortened(classes[one], CAPTION) for one in pair)
        captions.append(f"label: {label}\npredicted: {mistaken} {shares[image, pair[1]].exp():.0%}\nimage {image}")
    return worst, captions
