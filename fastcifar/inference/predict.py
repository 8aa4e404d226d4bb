"""`fastcifar predict`: the classes of unlabelled images, as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from fastcifar.errors import ConfigError
from fastcifar.inference import TTA
from fastcifar.inference.classifier import Classifier, open_classifier
from fastcifar.inference.images import open_images
from fastcifar.runs.files import publish, writing


def predict(
    runs: Sequence[Path],
    images: Path,
    out: Path,
    *,
    which: str | None = None,
    tta: TTA = "none",
    probabilities: bool = False,
    trust: bool = False,
) -> int:
    """Writes a header, then `index,prediction` for every image, in order and counted from 0; returns how many.

    Several runs decide by the mean of their probabilities; of equal ones, the class with the lower label wins.

    Args:
        runs: their folders; each preprocesses the images as it was trained to.
        images: as `inference.images.open_images` has them.
        out: the .csv file; it appears whole, or what was there before stays.
        which: of each run's weights; see `runs.network.load_network`.
        tta: test-time augmentation.
        probabilities: whether a column for each class follows.
        trust: whether code that comes with a run may be executed.

    Raises:
        FastcifarError: a run or the images cannot be used, the runs differ in classes or image size, or `out` cannot be written.
    """
    if not runs:
        raise ConfigError("there is no run to predict with; name the folder of one or more.")
    if os.path.isdir(out):
        raise ConfigError(f"--out {out} is a folder; give a file, such as predictions.csv.")
    if os.path.exists(out) and os.path.exists(images) and os.path.samefile(out, images):
        raise ConfigError(f"--out {out} is where the images are; choose another file.")
    members = [open_classifier(path, which, trust=trust) for path in runs]
    check_agreement(members)
    classes = members[0].network.classes
    source = open_images(images, members[0].network.image_size)
    with appearing(out) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("index", "prediction", *(classes if probabilities else ())))
        index = 0
        for batch in source.batches(members[0].batch_size):
            means = mean_probabilities(members, batch, tta)
            for row, winner in zip(means.tolist(), means.argmax(dim=1).tolist(), strict=True):
                table.writerow((index, classes[winner], *(f"{value:.7g}" for value in row if probabilities)))
                index += 1
    return index


def check_agreement(members: Sequence[Classifier]) -> None:
    """Raises ConfigError where the runs were trained on other classes, another order of them, or another size of images than the first."""
    first = members[0]
    for other in members[1:]:
        if other.network.classes != first.network.classes:
            raise ConfigError(f"{other.path} knows other classes than {first.path}; predict with runs of the same data set.")
        if other.network.image_size != first.network.image_size:
            sizes = f"{other.network.image_size} pixels a side and {first.path} {first.network.image_size}"
            raise ConfigError(f"{other.path} takes images of {sizes}; predict with runs of the same data set.")


def mean_probabilities(members: Sequence[Classifier], images: Tensor, tta: TTA = "none") -> Tensor:
    """Images uint8 (N, H, W, 3) -> float64 (N, classes), each row of which sums to 1."""
    return torch.stack([member.logits(images, tta).double().softmax(dim=1) for member in members]).mean(dim=0)


@contextmanager
def appearing(path: Path) -> Iterator[TextIO]:
    """A text file to write, which takes the place of `path` at the end of the block; where the block fails, nothing of it is left.

    Raises:
        FastcifarError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with open(partial, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
