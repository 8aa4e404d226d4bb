"""`fastcifar eval`: how good a finished or interrupted run is, from its folder alone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcifar.analysis.evaluation_plots import plot_confusion, plot_mistakes, plot_reliability
from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.engine.host import device_name, resolve_device
from fastcifar.errors import FastcifarError
from fastcifar.inference import TTA
from fastcifar.inference.classifier import Classifier, precision_of
from fastcifar.inference.images import read_pair
from fastcifar.inference.metrics import (
    Bin,
    calibration_error,
    class_scores,
    confusion_matrix,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    wilson_interval,
)
from fastcifar.inference.report import Calibration, Report, Score
from fastcifar.inference.speed import measure_speed
from fastcifar.runs.files import write_text, writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import StoredNetwork, read_network

FOLDER = "evaluation"
MISTAKES = 24
"""Shown in the picture."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a network made of a labelled set."""

    logits: Tensor
    """float32 (N, classes), on the CPU, as the labels."""
    labels: Tensor
    """int64 (N,)."""
    seconds: float

    @property
    def score(self) -> Score:
        total, correct = len(self.labels), int((self.logits.argmax(dim=1) == self.labels).sum())
        loss = negative_log_likelihood(self.logits, self.labels)
        return Score(total, correct / total, wilson_interval(correct, total), loss, self.seconds)


def evaluate_run(
    path: Path,
    data_dir: Path | None = None,
    *,
    which: str | None = None,
    tta: TTA = "none",
    pairs: Sequence[str] = (),
    speed: bool = False,
    out: Path | None = None,
    trust: bool = False,
) -> Report:
    """Measures a run on its test set, and writes evaluation.json and the pictures.

    Network and preprocessing are those stored with the weights.

    Args:
        path: the run's folder.
        data_dir: where to look for the data set; the run's own place by default.
        which: the weights that the pictures, classes and calibration are about; see `runs.network.load_network`.
        tta: test-time augmentation of those weights, measured beside none.
        pairs: further test sets; see `inference.images.read_pair`.
        speed: whether to measure latency and throughput.
        out: folder of the report; `evaluation` within the run's by default.
        trust: whether code that comes with the run may be executed.

    Raises:
        FastcifarError: the folder is no run, or has no checkpoint yet, or the report cannot be written; DataError where the data set is
            not to be had.
    """
    config, device = Run.open(path).config(), resolve_device("auto")
    stored, precision = read_network(path, trust=trust), precision_of(path, device)
    chosen = stored.choose(which)
    test = load_dataset(config.data.dataset, "test", data_dir or config.data.data_dir)
    classifiers = {name: Classifier(path, stored.load(device, name), device, precision) for name in (chosen, *stored.weights)}
    network = classifiers[chosen].network
    check_dataset(stored, test, config.data.dataset)
    extra = {text: read_pair(text, network.image_size, len(network.classes)) for text in pairs}
    plain = {name: classify(classifiers[name], test.images, test.labels) for name in stored.weights}
    classifier = classifiers[chosen]
    outcome = plain[chosen] if tta == "none" else classify(classifier, test.images, test.labels, tta)
    confusion = confusion_matrix(outcome.logits, test.labels)
    report = Report(
        arch=network.arch,
        dataset=config.data.dataset,
        device=device_name(device),
        precision=precision.name,
        weights={name: one.score for name, one in plain.items()},
        chosen=chosen,
        tta=tta,
        augmented=None if tta == "none" else outcome.score,
        classes=class_scores(confusion, network.classes),
        confusion=confusion.tolist(),
        calibration=calibrate(outcome, validation_outcome(classifier, config, data_dir, tta)),
        sets={text: classify(classifier, *pair, tta).score for text, pair in extra.items()},
        speed=measure_speed(classifier, tta) if speed else (),
    )
    write(report, outcome, test, out or path / FOLDER)
    return report


def check_dataset(stored: StoredNetwork, test: ImageSet, name: str) -> None:
    """Raises FastcifarError where `test` has other classes than the run was trained on, or images of another size."""
    if stored.network["classes"] != list(test.classes):
        raise FastcifarError(f"{stored.path} was trained on other classes than {name} has; restore the data set it was trained on.")
    size = stored.image_size
    if test.images.shape[1:3] != (size, size):
        found = "x".join(map(str, test.images.shape[1:3]))
        raise FastcifarError(f"{stored.path} was trained on {size}x{size} images and {name} has {found}; restore those.")


def classify(classifier: Classifier, images: Tensor, labels: Tensor, tta: TTA = "none") -> Outcome:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), timed after a batch that is not."""
    classifier.logits(images[: classifier.batch_size], tta)
    start = time.perf_counter()
    logits = classifier.logits(images, tta)
    return Outcome(logits, labels, time.perf_counter() - start)


def validation_outcome(classifier: Classifier, config: RunConfig, data_dir: Path | None, tta: TTA) -> Outcome | None:
    """Of the images that the run set apart; None where it set none apart."""
    if not config.data.val_split:
        return None
    train = load_dataset(config.data.dataset, "train", data_dir or config.data.data_dir)
    _, apart = validation_split(train.labels, config.data.val_split, config.data.split_seed, len(train.classes))
    return classify(classifier, train.images[apart], train.labels[apart], tta)


def calibrate(test: Outcome, validation: Outcome | None) -> Calibration:
    """The calibration on the test set, at the temperature fitted on the validation set, or on the test set where there is none."""
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


def write(report: Report, outcome: Outcome, test: ImageSet, folder: Path) -> None:
    """evaluation.json, confusion.png, reliability.png and, where there are any mistakes, mistakes.png."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mistakes.png").unlink(missing_ok=True)
    plot_confusion(torch.tensor(report.confusion).numpy(), test.classes, folder / "confusion.png")
    temperature, bins = report.calibration.temperature, report.calibration.bins
    scaled = reliability(outcome.logits, outcome.labels, temperature)
    series = {"as it is": points(bins), f"at temperature {temperature:.3f}": points(scaled)}
    plot_reliability(series, [one.images for one in bins], folder / "reliability.png")
    worst, captions = worst_mistakes(outcome, test.classes)
    if captions:
        plot_mistakes(test.images[worst].numpy(), captions, folder / "mistakes.png")
    write_text(folder / "evaluation.json", json.dumps(dataclasses.asdict(report), indent=2) + "\n")


def points(bins: Sequence[Bin]) -> list[tuple[float, float, float]]:
    """Confidence, accuracy and share of the images, of every bin that has any."""
    total = sum(one.images for one in bins)
    return [(one.confidence, one.accuracy, one.images / total) for one in bins if one.images]


def worst_mistakes(outcome: Outcome, classes: Sequence[str], count: int = MISTAKES) -> tuple[Tensor, list[str]]:
    """The wrongly classified images that give their label the least probability, the worst first: int64 (n,), and a caption for each."""
    shares = outcome.logits.double().log_softmax(dim=1)
    predicted = outcome.logits.argmax(dim=1)
    wrong = (predicted != outcome.labels).nonzero().flatten()
    of_label = shares[wrong, outcome.labels[wrong]]
    worst = wrong[of_label.argsort(stable=True)[:count]]
    rows = zip(worst.tolist(), outcome.labels[worst].tolist(), predicted[worst].tolist(), strict=True)
    return worst, [f"{index}: {classes[label]}\n{classes[given]} {shares[index, given].exp():.0%}" for index, label, given in rows]
