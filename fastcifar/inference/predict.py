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
from fastcifar.inference import TTA
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

    @property
    def names(self) -> list[str]:
        return [self.classes[label] for label in self.labels.tolist()]


def predict(
    runs: str | Path | Sequence[str | Path],
    images: Source,
    *,
    which: str | None = None,
    tta: TTA = "none",
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
        trust: whether code that comes with a run may be executed.
        model: the network that was given to `fastcifar.train`, of which a copy takes the weights.

    Raises:
        FastcifarError: a run or the images cannot be used, or the runs differ in classes or image size.
    """
    classifier = open_classifier(runs, LoadOptions(which, trust, model))
    batches = open_images(images, classifier.image_size).batches(classifier.batch_size)
    probabilities = torch.cat([classifier.probabilities(batch, tta) for batch in batches])
    return Predictions(probabilities.argmax(dim=1), probabilities, classifier.classes)


def write_predictions(
    runs: Sequence[Path],
    images: Path,
    out: Path,
    options: LoadOptions,
    *,
    tta: TTA = "none",
    probabilities: bool = False,
) -> Images:
    """Writes a table of any number of images, a header and then a row for each, in order; returns the images.

    A row is `file,prediction` for pictures, by their paths below the folder given, else `index,prediction`, counted
    from 0; with `probabilities` a column for each class follows. The file `out` appears whole, or an earlier one stays.
    Raises FastcifarError as `predict` does, or where `out` cannot be written.
    """
    if os.path.isdir(out):
        raise ConfigError(f"--out {out} is a folder; give a file, such as predictions.csv.")
    if os.path.exists(out) and os.path.exists(images) and os.path.samefile(out, images):
        raise ConfigError(f"--out {out} is where the images are; choose another file.")
    classifier = open_classifier(runs, options)
    source, classes = open_images(images, classifier.image_size), classifier.classes
    # What UTF-8 lacks, such as the bytes of a file's name that are none, is written as an escape.
    with appearing(out, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file" if source.names else "index", "prediction", *(classes if probabilities else ())))
        names = iter(source.names or range(len(source)))
        for batch in source.batches(classifier.batch_size):
            shares = classifier.probabilities(batch, tta)
            for row, winner in zip(shares.tolist(), shares.argmax(dim=1).tolist(), strict=True):
                name = str(next(names)).replace("\r", "\\r")  # which csv would not quote
                table.writerow((name, classes[winner], *(f"{value:.7g}" for value in row if probabilities)))
    return source


def lines_of(images: Images, out: Path) -> Iterator[str]:
    """Describes the predictions in `out` of images that have been read."""
    if count := images.resized.total():
        sizes = "{}x{}".format(*next(iter(images.resized))) if len(images.resized) == 1 else "several sizes"
        what = f"{count:,} images of {sizes} were cut to their" if count > 1 else f"1 image of {sizes} was cut to its"
        yield f"{what} largest centred square and resized to {images.size}x{images.size}."
    yield f"{len(images):,} prediction{'s' if len(images) > 1 else ''} in {out}"
