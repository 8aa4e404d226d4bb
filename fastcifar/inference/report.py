"""What an evaluation found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastcifar.inference import TTA
from fastcifar.inference.metrics import Bin, ClassScore
from fastcifar.inference.speed import Speed
from fastcifar.runs.console import percent


@dataclass(frozen=True)
class Score:
    """How some weights do on a labelled set."""

    images: int
    accuracy: float
    """As a fraction."""
    interval: tuple[float, float]
    """95%, by Wilson."""
    loss: float
    """Mean cross-entropy."""
    seconds: float
    """For all images, from the host's memory to logits there, once warmed up."""


@dataclass(frozen=True)
class Calibration:
    """How far the confidence can be believed, before and after all logits are divided by one temperature."""

    error: float
    """Expected calibration error, as a fraction."""
    temperature: float
    """The likeliest, below 1 for a network that is too modest, above it for one too sure of itself."""
    fitted_on: Literal["validation", "test"]
    """Where the run has no validation split, the test set itself, which flatters what follows."""
    scaled_error: float
    scaled_loss: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Report:
    """evaluation.json."""

    arch: str
    dataset: str
    device: str
    precision: str
    weights: dict[str, Score]
    """Test scores, without augmentation, of every set of weights that the run keeps; or of every member of the ensemble
    that votes, by its folder and weights, and of all of them as "ensemble"."""
    chosen: str
    """Which of these all below is about."""
    tta: TTA
    augmented: Score | None
    """With test-time augmentation, where it was asked for; then so is all below."""
    classes: tuple[ClassScore, ...]
    confusion: list[list[int]]
    """A row for each label, a column for each prediction."""
    calibration: Calibration
    sets: dict[str, Score]
    """Further test sets, by their paths."""
    speed: tuple[Speed, ...]

    @property
    def score(self) -> Score:
        """What the run comes to."""
        return self.augmented or self.weights[self.chosen]


def lines_of(report: Report, per_class: bool = False) -> Iterator[str]:
    """What the person at the keyboard reads."""
    wide = max(10, *map(len, report.weights))
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
        "temperature "
        f"{calibration.temperature:.3f}, fitted on the {calibration.fitted_on} set"
    )
    if per_class:
        width = max(len(one.name) for one in report.classes)
        yield f"{'class':{width}}  images   recall  precision"
        for one in report.classes:
            yield f"{one.name:{width}}  {one.images:6,}  {percent(one.recall):>7}  {percent(one.precision):>9}"
    for speed in report.speed:
        yield (
            f"batch {speed.batch_size:>4}  {1000 * speed.latency_seconds:9.3f} ms  "
            f"{speed.images_per_second:12,.0f} img/s"
        )


def described(score: Score) -> str:
    low, high = (f"{100 * bound:.2f}" for bound in score.interval)
    return f"{percent(score.accuracy)} ({low} to {high})  loss {score.loss:.4f}"
