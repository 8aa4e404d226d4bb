"""Checks an exported file, which computes in fp32, against the trained networks, on test images where there are any."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.errors import FastcifarError
from fastcifar.inference.classifier import Classifier
from fastcifar.inference.evaluate import check_dataset
from fastcifar.runs.network import TrainedNetwork

TOLERANCE = 1e-5
"""Largest allowed difference of a probability."""
CHECKED = 64
"""Number of images on which probabilities are compared."""
BATCHES = (1, 7, CHECKED)
"""Batch sizes that an export must accept."""

Classify = Callable[[Tensor], Tensor]
"""Images uint8 (N, H, W, 3) -> probabilities float32 (N, classes)."""


@dataclass(frozen=True)
class FileScore:
    """An exported file's own answers to all test images."""

    images: int
    correct: int
    precision: str | None
    """The precision in which the trained networks were asked too; None where they were not."""
    differing: int
    """Images to which they gave another class in it."""


@dataclass(frozen=True)
class Check:
    images: int
    """Number of different images on which probabilities were compared."""
    dataset: str
    difference: float
    """Largest difference of a probability from the trained network's, or from the mean of several networks."""
    score: FileScore | None
    """None where the run's test images were not at hand, and random ones were taken."""

    def __str__(self) -> str:
        if self.score:
            return f"the first {self.images} test images of {self.dataset}"
        return f"{self.images} random images, since {self.dataset} as the run had it was not at hand"


def find_test_set(
    config: RunConfig, network: TrainedNetwork, data_dir: Path | None, test_set: ImageSet | None
) -> ImageSet | None:
    """Returns `test_set`, by default that of the run; None where it is not at hand as it was.

    Raises FastcifarError where `test_set` is not of the network's classes and image size.
    """
    if test_set is not None:
        check_dataset(network, test_set, "test_set")
        return test_set.to("cpu")
    with suppress(FastcifarError):
        found = load_dataset(config.data.dataset, "test", data_dir or config.data.data_dir, download=False)
        check_dataset(network, found, config.data.dataset)
        return None if network.knows("test", found) is False else found
    return None


@torch.inference_mode()
def check_file(
    classify: Classify, trained: Classifier, other: Classifier | None, dataset: str, test_set: ImageSet | None
) -> Check:
    """Compares probabilities with those of `trained`, which computes in fp32 too, in batches of several sizes.

    All images of the test set, if any, are then classified by the file, and by `other` where it is given.
    """
    images = sample_images(test_set, trained.image_size)
    expected = trained(images).softmax(dim=1)
    difference = torch.stack([(classify(images[:count]) - expected[:count]).abs().max() for count in BATCHES]).max()
    score = score_file(classify, test_set, trained.batch_size, other) if test_set else None
    return Check(min(CHECKED, len(test_set or images)), dataset, difference.item(), score)


def sample_images(test_set: ImageSet | None, size: int) -> Tensor:
    """Returns images uint8 (CHECKED, size, size, 3): the first of the test set, repeated if few, or random ones."""
    if test_set is not None:
        return test_set.images[torch.arange(CHECKED) % len(test_set)]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (CHECKED, size, size, 3), dtype=torch.uint8, generator=generator)


def score_file(classify: Classify, test_set: ImageSet, batch_size: int, other: Classifier | None) -> FileScore:
    answers = torch.cat([classify(images).argmax(dim=1) for images in test_set.images.split(batch_size)])
    correct = int((answers == test_set.labels).sum())
    if other is None:
        return FileScore(len(test_set), correct, None, 0)
    differing = int((answers != other.logits(test_set.images).argmax(dim=1)).sum())
    return FileScore(len(test_set), correct, other.precision.name, differing)
