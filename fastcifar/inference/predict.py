"""Predicts the classes of unlabelled images, in memory or as a table in a file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.errors import ConfigError
from fastcifar.inference import TTA, LabelForm, PrecisionName
from fastcifar.inference.classifier import open_classifier
from fastcifar.inference.images import Images, Source, open_images
from fastcifar.runs.files import appearing
from fastcifar.runs.network import LoadOptions


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for N images, on the CPU."""

    labels: Tensor
    """int64 (N,): the likeliest class; of equal ones, the lowest label."""
    probabilities: Tensor
    """float64 (N, classes), each row of which sums to 1."""
    classes: tuple[str, ...]
    """Names of the classes, by label."""
    precision: str
    """What the networks computed in: bf16, fp16 or fp32."""

    @property
    def names(self) -> list[str]:
        return [self.classes[label] for label in self.labels.tolist()]


def predict(
    runs: str | Path | Sequence[str | Path],
    images: Source,
    *,
    which: str | None = None,
    tta: TTA = "none",
    precision: PrecisionName = "auto",
    trust: bool = False,
    model: nn.Module | None = None,
) -> Predictions:
    """Predicts the classes of `images`; several runs decide by the mean of their probabilities.

    Args:
        runs: a run's folder or an ensemble's, which stands for its members that vote; or several. Each network counts
            the same, and preprocesses the images as it was trained to.
        images: uint8 (N, H, W, 3), RGB, as an array or a tensor; a Pillow image; a path, as
            `inference.images.open_images` takes it; or a list of these. Images of another size than the runs' are cut
            to their largest centred square and resized.
        which: weights of each run, such as "weights" or "ema-0.999"; by default the best on the validation split, or
            else an average.
        tta: test-time augmentation: "none", "mirror" or "mirror-shift".
        precision: what the networks compute in: "bf16", "fp16" or "fp32"; by default what they were trained in.
        trust: whether code that comes with a run may be executed.
        model: the network that was given to `fastcifar.train`, of which a copy takes the weights.

    Raises:
        FastcifarError: a run or the images cannot be used, or the runs differ in classes or image size.
    """
    classifier = open_classifier(runs, LoadOptions(which, trust, model), precision)
    batches = open_images(images, classifier.image_size).batches(classifier.batch_size)
    probabilities = torch.cat([classifier.probabilities(batch, tta) for batch in batches])
    labels = probabilities.argmax(dim=1)
    return Predictions(labels, probabilities, classifier.classes, classifier.precision.name)


@dataclass(frozen=True)
class TableForm:
    """The form of a table of predictions. Raises ConfigError where `columns` are not two."""

    columns: str | None = None
    """Titles of the first two columns, such as id,label; by default file or index, and prediction."""
    labels: LabelForm = "name"
    probabilities: bool = False
    """Whether a column for each class follows."""

    def __post_init__(self) -> None:
        if self.columns is not None and len(list(filter(None, self.columns.split(",")))) != 2:
            raise ConfigError(f"columns is {self.columns!r}; give the titles of two, such as id,label.")


def write_predictions(
    runs: Sequence[Path],
    images: Path,
    out: Path,
    options: LoadOptions,
    *,
    tta: TTA = "none",
    precision: PrecisionName = "auto",
    form: TableForm = TableForm(),
) -> tuple[Images, str]:
    """Writes a table of any number of images, a header and then a row for each, in order.

    A row begins with the picture's path below the folder given, else with the image's index, counted from 0; the
    prediction follows. The file `out` appears whole, or an earlier one stays.
    Returns the images, and the precision that the networks computed in. Raises FastcifarError as `predict` does, or
    where `out` cannot be written.
    """
    if os.path.isdir(out):
        raise ConfigError(f"--out {out} is a folder; give a file, such as predictions.csv.")
    if os.path.exists(out) and os.path.exists(images) and os.path.samefile(out, images):
        raise ConfigError(f"--out {out} is where the images are; choose another file.")
    classifier = open_classifier(runs, options, precision)
    source, classes = open_images(images, classifier.image_size), classifier.classes
    # What UTF-8 lacks, such as the bytes of a file's name that are none, is written as an escape.
    with appearing(out, "x", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        shown = [cell(name) for name in classes]
        predicted = shown if form.labels == "name" else range(len(classes))
        columns = form.columns or ("file,prediction" if source.names else "index,prediction")
        table.writerow((*map(cell, columns.split(",")), *(shown if form.probabilities else ())))
        names = map(cell, source.names or map(str, range(len(source))))
        for batch in source.batches(classifier.batch_size):
            shares = classifier.probabilities(batch, tta)
            for row, winner in zip(shares.tolist(), shares.argmax(dim=1).tolist(), strict=True):
                table.writerow(
                    (next(names), predicted[winner], *(f"{value:.7g}" for value in row if form.probabilities))
                )
    return source, classifier.precision.name


def cell(text: str) -> str:
    """Puts an apostrophe before text that a spreadsheet would execute as a formula; csv itself quotes all but \\r."""
    return ("'" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + text.replace("\r", "\\r")


def lines_of(images: Images, precision: str, out: Path) -> Iterator[str]:
    """Describes what `write_predictions` returned."""
    if count := images.resized.total():
        sizes = "{}x{}".format(*next(iter(images.resized))) if len(images.resized) == 1 else "several sizes"
        what = f"{count:,} images of {sizes} were cut to their" if count > 1 else f"1 image of {sizes} was cut to its"
        yield f"{what} largest centred square and resized to {images.size}x{images.size}."
    yield f"{len(images):,} prediction{'s' if len(images) > 1 else ''} in {out}, computed in {precision}"
