"""`fastcifar eval`: how good a finished or interrupted run is, or an ensemble, from its folder alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.device import device_name, resolve_device
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
from fastcifar.plots import draw, plot_confusion, plot_images, plot_reliability, shortened
from fastcifar.registry import GIVEN
from fastcifar.runs.ensembles import is_ensemble
from fastcifar.runs.files import write_text, writing
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork, joint_logits, load_networks, read_network

FOLDER = "evaluation"
ENSEMBLE = "ensemble"
"""What the members of an ensemble are called together, among their scores."""
MISTAKES, CAPTION = 24, 12
"""Shown in the picture, and letters of a class's name in a caption there."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a classifier made of a labelled set."""

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
    path: str | Path,
    data_dir: Path | None = None,
    *,
    which: str | None = None,
    tta: TTA = "none",
    pairs: Sequence[str] = (),
    speed: bool = False,
    out: str | Path | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
    test_set: ImageSet | None = None,
) -> Report:
    """Measures a run or an ensemble on its test set, and writes evaluation.json and the pictures.

    Networks and preprocessing are those stored with the weights. Of an ensemble, every member that votes is measured,
    and what they come to together by the mean of their probabilities; that is what the pictures, classes and
    calibration are about.

    Args:
        path: folder of the run or the ensemble.
        data_dir: where to look for the data set; the run's own place by default.
        which: the weights of a run that the pictures, classes and calibration are about; see
        `runs.network.load_network`. tta: test-time augmentation of those weights, measured beside none. pairs: further
        test sets; see `inference.images.read_pair`. speed: whether to measure latency and throughput. out: folder of
        the report; `evaluation` within the run's by default. trust: whether code that comes with a run may be executed.
        model: the network that was given to `fastcifar.train`, of which a copy takes the weights. test_set: the images
        to measure on, in place of those of the run's data set.

    Raises:
        FastcifarError: the folder is neither, or has no checkpoint yet, or the report cannot be written; DataError
        where the data set is
            not to be had.
    """
    path, device = Path(path), resolve_device("auto")
    parts, chosen = measured_networks(path, device, which, trust=trust, model=model)
    networks = (parts[chosen],) if chosen in parts else tuple(parts.values())
    classifier = Classifier(networks, device, precision_of(networks, device))
    configs = [Run.open(network.path).config() for network in networks]
    data = replace(configs[0].data, data_dir=data_dir or configs[0].data.data_dir)
    dataset = data.dataset if test_set is None else "test_set"
    test = load_dataset(data.dataset, "test", data.data_dir) if test_set is None else test_set
    check_dataset(networks[0], test, dataset)
    extra = {text: read_pair(text, classifier.image_size, len(classifier.classes)) for text in pairs}
    plain = {
        name: classify(replace(classifier, networks=(part,)), test.images, test.labels) for name, part in parts.items()
    }
    if chosen not in plain:
        plain[chosen] = together(list(plain.values()))
    outcome = plain[chosen] if tta == "none" else classify(classifier, test.images, test.labels, tta)
    confusion = confusion_matrix(outcome.logits, test.labels)
    report = Report(
        arch=", ".join(dict.fromkeys(network.arch for network in networks)),
        dataset=dataset,
        device=device_name(device),
        precision=classifier.precision.name,
        weights={name: one.score for name, one in plain.items()},
        chosen=chosen,
        tta=tta,
        augmented=None if tta == "none" else outcome.score,
        classes=class_scores(confusion, classifier.classes),
        confusion=confusion.tolist(),
        calibration=calibrate(outcome, validation_outcome(classifier, configs, data.data_dir, tta)),
        sets={text: classify(classifier, *pair, tta).score for text, pair in extra.items()},
        speed=measure_speed(classifier, tta) if speed else (),
    )
    write(report, outcome, test, Path(out) if out else path / FOLDER)
    return report


def measured_networks(
    path: Path, device: torch.device, which: str | None, *, trust: bool, model: nn.Module | None
) -> tuple[dict[str, TrainedNetwork], str]:
    """What is measured by itself, by name, and the name of what the whole comes to.

    That is every set of weights of a run, of which one is chosen; or every member of an ensemble that votes, and then
    all of them.
    """
    if is_ensemble(path):
        voting = load_networks(path, device, which, trust=trust, model=model)
        return dict(zip(names_of(path, voting), voting, strict=True)), ENSEMBLE
    stored = read_network(path, trust=trust, model=model)
    chosen = stored.choose(which)
    return {name: stored.load(device, name) for name in stored.weights}, chosen


def names_of(path: Path, members: Sequence[TrainedNetwork]) -> list[str]:
    """What the members of the ensemble at `path` are called: their folders, from its own where they lie within that,
    and weights.
    """
    return [
        f"{one.path.relative_to(path) if one.path.is_relative_to(path) else one.path} {one.weights}" for one in members
    ]


def check_dataset(network: TrainedNetwork, test: ImageSet, name: str) -> None:
    """Raises FastcifarError where `test` has other classes than the run was trained on, or images of another size."""
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


def classify(classifier: Classifier, images: Tensor, labels: Tensor, tta: TTA = "none") -> Outcome:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), timed after a batch that is not."""
    classifier.logits(images[: classifier.batch_size], tta)
    start = time.perf_counter()
    logits = classifier.logits(images, tta)
    return Outcome(logits, labels, time.perf_counter() - start)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """What an ensemble makes of the labelled set of which each of its members made one of `outcomes`."""
    logits = joint_logits([one.logits for one in outcomes])
    return Outcome(logits, outcomes[0].labels, sum(one.seconds for one in outcomes))


def validation_outcome(
    classifier: Classifier, configs: Sequence[RunConfig], data_dir: Path | None, tta: TTA
) -> Outcome | None:
    """The result on the images that all of the classifier's runs set apart; None where there are none, or they are
    not on disk.
    """
    data = configs[0].data
    if split_obstacle(configs) or data.dataset == GIVEN:
        return None
    return classify(classifier, *validation_set(configs[0], load_dataset(data.dataset, "train", data_dir)), tta)


def split_obstacle(configs: Sequence[RunConfig]) -> str | None:
    """Why nothing can be decided on images that all of the runs set apart; None where it can."""
    splits = {(config.data.val_split, config.data.split_seed) for config in configs}
    if 0 in {count for count, _ in splits}:
        return "not all runs set images apart for validation"
    return "the runs set different images apart for validation" if len(splits) > 1 else None


def validation_set(config: RunConfig, train: ImageSet) -> tuple[Tensor, Tensor]:
    """Those of the training images that the run set apart, uint8 (N, H, W, 3), and their labels, int64 (N,)."""
    _, apart = validation_split(train.labels, config.data.val_split, config.data.split_seed, len(train.classes))
    return train.images[apart], train.labels[apart]


def calibrate(test: Outcome, validation: Outcome | None) -> Calibration:
    """The calibration on the test set, at the temperature fitted on the validation set, or on the test set where
    there is none.
    """
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
    """evaluation.json, confusion.png, reliability.png and, where there are any mistakes, mistakes.png.

    A picture that cannot be drawn is missing, which stderr is told.
    """
    temperature, bins = report.calibration.temperature, report.calibration.bins
    scaled = reliability(outcome.logits, outcome.labels, temperature)
    series = {"as it is": points(bins), f"at temperature {temperature:.3f}": points(scaled)}
    worst, captions = worst_mistakes(outcome, test.classes)
    pictures = {
        "confusion.png": (plot_confusion, torch.tensor(report.confusion).numpy(), test.classes),
        "reliability.png": (plot_reliability, series, [one.images for one in bins]),
        "mistakes.png": (plot_images, test.images[worst].numpy()[None], captions),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evaluation.json", json.dumps(asdict(report), indent=2) + "\n")
        for name in pictures:
            (folder / name).unlink(missing_ok=True)
    if not captions:
        del pictures["mistakes.png"]
    for name, (plot, *given) in pictures.items():
        failure = draw(folder / name, plot, *given)
        if failure:
            print(failure, file=sys.stderr)


def points(bins: Sequence[Bin]) -> list[tuple[float, float, float]]:
    """Confidence, accuracy and share of the images, of every bin that has any."""
    total = sum(one.images for one in bins)
    return [(one.confidence, one.accuracy, one.images / total) for one in bins if one.images]


def worst_mistakes(outcome: Outcome, classes: Sequence[str], count: int = MISTAKES) -> tuple[Tensor, list[str]]:
    """The wrongly classified images that give their label the least probability, the worst first: int64 (n,), and a
    caption for each.
    """
    shares = outcome.logits.double().log_softmax(dim=1)
    predicted = outcome.logits.argmax(dim=1)
    wrong = (predicted != outcome.labels).nonzero().flatten()
    of_label = shares[wrong, outcome.labels[wrong]]
    worst = wrong[of_label.argsort(stable=True)[:count]]
    rows = zip(worst.tolist(), outcome.labels[worst].tolist(), predicted[worst].tolist(), strict=True)
    names = [shortened(name, CAPTION) for name in classes]
    return worst, [
        f"label: {names[label]}\npredicted: {names[given]} {shares[index, given].exp():.0%}\nimage {index}"
        for index, label, given in rows
    ]
