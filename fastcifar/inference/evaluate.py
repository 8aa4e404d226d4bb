"""`fastcifar eval`: evaluates a finished or interrupted run, or an ensemble, from its folder alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.device import device_name, resolve_device, synchronize
from fastcifar.errors import FastcifarError
from fastcifar.inference import TTA, PrecisionName
from fastcifar.inference.classifier import Classifier, precision_of
from fastcifar.inference.images import read_pair
from fastcifar.inference.metrics import (
    calibration_error,
    class_scores,
    confusion_matrix,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    wilson_interval,
)
from fastcifar.inference.report import Calibration, Report, Score, Speed, write_report
from fastcifar.models import GIVEN
from fastcifar.runs.ensembles import SplitObstacle, is_ensemble
from fastcifar.runs.files import inside
from fastcifar.runs.folder import Run
from fastcifar.runs.network import LoadOptions, TrainedNetwork, joint_logits, load_networks, read_network

FOLDER = "evaluation"
ENSEMBLE = "ensemble"
"""Name for all members of an ensemble together, among their scores."""
SPEED_SIZES = {"cpu": (1, 8, 32, 128), "cuda": (1, 8, 32, 128, 512, 2048)}
"""Batch sizes for which the speed is measured."""
SPEED_SECONDS = 0.5
"""Seconds of measurement for each batch size, after the warm-up."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A classifier's logits for a labelled set."""

    logits: Tensor
    """float32 (N, classes), on the CPU like the labels."""
    labels: Tensor
    """int64 (N,)."""
    seconds: float

    @property
    def score(self) -> Score:
        total, correct = len(self.labels), int((self.logits.argmax(dim=1) == self.labels).sum())
        loss = negative_log_likelihood(self.logits, self.labels)
        return Score(total, correct / total, wilson_interval(correct, total), loss, self.seconds)


@dataclass(frozen=True, eq=False)
class Subject:
    """A run's sets of weights, or an ensemble's voters, by name; which of them, or `ENSEMBLE`, to look at closely."""

    parts: dict[str, Classifier]
    chosen: str
    classifier: Classifier
    """What `chosen` names."""
    configs: list[RunConfig]
    """Those of the classifier's networks."""


def evaluate_run(
    path: str | Path,
    data_dir: Path | None = None,
    *,
    which: str | None = None,
    tta: TTA = "none",
    precision: PrecisionName = "auto",
    pairs: Sequence[str] = (),
    speed: bool = False,
    out: str | Path | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
    test_set: ImageSet | None = None,
) -> Report:
    """Measures a run or an ensemble on its test set, and writes evaluation.json and the pictures.

    Each voting member of an ensemble is measured, and then all of them by the mean of their probabilities, which the
    pictures, classes and calibration are about.

    Args:
        path: folder of the run or the ensemble.
        data_dir: where to look for the data set; the run's own place by default.
        which: the weights of a run to look at closely; like `trust` and `model`, as in `runs.network.LoadOptions`.
        tta: test-time augmentation of those weights, measured beside none.
        precision: what the networks compute in: "bf16", "fp16" or "fp32"; by default what they were trained in.
        pairs: further test sets; see `inference.images.read_pair`.
        speed: whether to measure latency and throughput.
        out: folder of the report; `evaluation` within the run's by default.
        test_set: the images to measure on, in place of those of the run's data set.

    Raises:
        FastcifarError: the run, the ensemble or the data set cannot be read, or the report cannot be written.
    """
    path = Path(path)
    subject = open_subject(path, LoadOptions(which, trust, model), precision)
    classifier, data_dir = subject.classifier, data_dir or subject.configs[0].data.data_dir
    dataset = subject.configs[0].data.dataset if test_set is None else "test_set"
    test = load_dataset(dataset, "test", data_dir) if test_set is None else test_set.to("cpu")
    check_dataset(classifier.networks[0], test, dataset)
    extra = {text: read_pair(text, classifier.image_size, len(classifier.classes)) for text in pairs}
    plain = classify_parts(subject, test)
    answers = plain[subject.chosen] if tta == "none" else classify(classifier, test.images, test.labels, tta)
    report = Report(
        arch=", ".join(dict.fromkeys(network.arch for network in classifier.networks)),
        dataset=dataset,
        same_images=same_images(classifier.networks, test),
        device=device_name(classifier.device),
        precision=classifier.precision.name,
        weights={name: one.score for name, one in plain.items()},
        chosen=subject.chosen,
        tta=tta,
        augmented=None if tta == "none" else answers.score,
        classes=class_scores(answers.logits, test.labels, test.classes),
        confusion=confusion_matrix(answers.logits, test.labels),
        calibration=calibrate(answers, classify_validation(subject, data_dir, tta)),
        sets={text: classify(classifier, *pair, tta).score for text, pair in extra.items()},
        speed=tuple(measure_speed(classifier, size, tta) for size in SPEED_SIZES[classifier.device.type] if speed),
    )
    write_report(Path(out) if out else inside(path, FOLDER), report, answers.logits, test)
    return report


def open_subject(path: Path, options: LoadOptions, precision: PrecisionName) -> Subject:
    """Loads every set of weights of the run at `path`, or an ensemble's voters."""
    device = resolve_device("auto")
    if is_ensemble(path):
        networks, chosen = load_networks(path, device, options), ENSEMBLE
        parts = dict(zip(names_of(path, networks), networks, strict=True))
    else:
        stored = read_network(path, options)
        chosen = stored.choose(options.weights)
        parts = {name: stored.load(device, name) for name in stored.weights}
        networks = (parts[chosen],)
    classifier = Classifier(networks, device, precision_of(networks, device, precision))
    singles = {name: replace(classifier, networks=(part,)) for name, part in parts.items()}
    return Subject(singles, chosen, classifier, [Run.open(network.path).config() for network in networks])


def names_of(path: Path, members: Sequence[TrainedNetwork]) -> list[str]:
    """Names an ensemble's members by their folders, relative to its own where they lie within it, and weights."""
    return [
        f"{one.path.relative_to(path) if one.path.is_relative_to(path) else one.path} {one.weights}" for one in members
    ]


def check_dataset(network: TrainedNetwork, test: ImageSet, name: str) -> None:
    """Raises FastcifarError where `test` differs from the run's data set in its classes or the size of its images."""
    if network.classes != test.classes:
        raise FastcifarError(
            f"{network.path} was trained on other classes than {name} has; restore the data set it was trained on."
        )
    size = network.image_size
    if test.images.shape[1:3] != (size, size):
        found = "x".join(map(str, test.images.shape[1:3]))
        raise FastcifarError(
            f"{network.path} was trained on {size}x{size} images and {name} has {found}; restore those."
        )


def same_images(networks: Sequence[TrainedNetwork], test: ImageSet) -> bool | None:
    known = {network.knows("test", test) for network in networks}
    return False if False in known else None if None in known else True


def classify(classifier: Classifier, images: Tensor, labels: Tensor, tta: TTA = "none") -> Answers:
    """Classifies images uint8 (N, H, W, 3) with labels int64 (N,); the time leaves out a warm-up batch."""
    classifier.logits(images[: classifier.batch_size], tta)
    start = time.perf_counter()
    logits = classifier.logits(images, tta)
    return Answers(logits, labels, time.perf_counter() - start)


def classify_parts(subject: Subject, test: ImageSet) -> dict[str, Answers]:
    """Classifies the test set by each part, and then by an ensemble as a whole, which asks no network again."""
    each = {name: classify(part, test.images, test.labels) for name, part in subject.parts.items()}
    if subject.chosen not in each:
        joint = joint_logits([one.logits for one in each.values()])
        each[subject.chosen] = Answers(joint, test.labels, sum(one.seconds for one in each.values()))
    return each


def classify_validation(subject: Subject, data_dir: Path | None, tta: TTA) -> Answers | None:
    """Classifies the images that all runs set apart for validation; None where they are not at hand as they were."""
    config = subject.configs[0]
    if split_obstacle(subject.configs) or config.data.dataset == GIVEN:
        return None
    train = load_dataset(config.data.dataset, "train", data_dir)
    if any(network.knows("train", train) is False for network in subject.classifier.networks):
        return None
    return classify(subject.classifier, *validation_set(config, train), tta)


def split_obstacle(configs: Sequence[RunConfig]) -> SplitObstacle | None:
    splits = {(config.data.val_split, config.data.split_seed) for config in configs}
    if 0 in {count for count, _ in splits}:
        return "no-split"
    return "different-splits" if len(splits) > 1 else None


def validation_set(config: RunConfig, train: ImageSet) -> tuple[Tensor, Tensor]:
    """Returns the images that the run set apart, uint8 (N, H, W, 3), and their labels, int64 (N,)."""
    _, apart = validation_split(train.labels, config.data.val_split, config.data.split_seed, len(train.classes))
    return train.images[apart], train.labels[apart]


def calibrate(test: Answers, validation: Answers | None) -> Calibration:
    """Measures calibration on the test set, at the temperature fitted on the validation set, if any, else there."""
    fitted = validation or test
    temperature = fit_temperature(fitted.logits, fitted.labels)
    bins = reliability(test.logits, test.labels)
    return Calibration(
        error=calibration_error(bins),
        temperature=temperature,
        fitted_on="validation" if validation else "test",
        scaled_error=calibration_error(reliability(test.logits, test.labels, temperature)),
        scaled_loss=negative_log_likelihood(test.logits, test.labels, temperature),
        bins=bins,
    )


def measure_speed(classifier: Classifier, batch_size: int, tta: TTA) -> Speed:
    side, device = classifier.image_size, classifier.device
    images = torch.randint(0, 256, (batch_size, side, side, 3), dtype=torch.uint8).to(device)
    for _ in range(2):
        classifier(images, tta)
    synchronize(device)
    times, end = [], time.perf_counter() + SPEED_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        classifier(images, tta)
        synchronize(device)
        times.append(time.perf_counter() - start)
    latency = statistics.median(times)
    return Speed(batch_size, latency, batch_size / latency)
