"""The evaluation of a run: its numbers against plainer code, and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import CLASSES, OPTIONS, SIZE, VOTERS, images_like, logits_of, make_run, mean_of_voters, small_network
from torch.nn import functional as F

from fastcifar import cli
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.errors import ConfigError, DataError, FastcifarError
from fastcifar.inference import evaluate as module
from fastcifar.inference.evaluate import evaluate_run
from fastcifar.inference.export import export_run
from fastcifar.inference.metrics import fit_temperature
from fastcifar.inference.report import lines_of
from fastcifar.runs import checkpoint as checkpoints


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures, which take most of the time and have tests of their own."""
    monkeypatch.setattr("fastcifar.inference.report.draw", lambda *_: None)
    monkeypatch.setattr(module, "SPEED_SECONDS", 0.01)


def test_the_numbers(run: Path, data: Path) -> None:
    report, test = evaluate_run(run), load_dataset(str(data), "test")
    assert list(report.weights) == ["weights", "ema-0.999"]
    for name, score in report.weights.items():
        logits = logits_of(run, test.images, name)
        assert (score.images, score.accuracy) == (70, (logits.argmax(1) == test.labels).double().mean().item())
        assert score.loss == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)
        assert score.interval[0] < score.accuracy < score.interval[1]
    assert report.chosen == "ema-0.999"
    confusion = np.array(report.confusion)
    assert confusion.sum(axis=1).tolist() == [24, 23, 23]
    assert confusion.trace() / 70 == report.score.accuracy
    assert [one.name for one in report.classes] == list(CLASSES)
    assert report.calibration.fitted_on == "test"
    assert report.calibration.scaled_loss <= report.score.loss + 1e-9


def test_a_report_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (run / "evaluation").symlink_to(outside)
    with pytest.raises(FastcifarError, match="evaluation is a link that may lead out of"):
        evaluate_run(run)
    assert not list(outside.iterdir())


def test_the_temperature_comes_from_the_validation_split(tmp_path: Path, data: Path) -> None:
    best = {"weights": {"epoch": 1, "accuracy": 0.5, "loss": 1.0}}
    run = make_run(tmp_path / "validated", data, val_split=21, run_seed=5, split_seed=7, best=best)
    report = evaluate_run(run)
    assert (report.chosen, report.calibration.fitted_on) == ("weights", "validation")
    train = load_dataset(str(data), "train")
    _, apart = validation_split(train.labels, 21, 7, 3)
    logits = logits_of(run, train.images[apart], "weights")
    assert report.calibration.temperature == pytest.approx(fit_temperature(logits, train.labels[apart]), rel=1e-4)


def test_the_precision_is_chosen_and_stated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default it is the run's own."""
    own, low = evaluate_run(run), evaluate_run(run, precision="bf16")
    assert (own.precision, low.precision) == ("fp32", "bf16")
    assert 1e-5 < abs(own.score.loss - low.score.loss) < 0.1
    assert cli.main(["eval", str(run), "--precision", "bf16"]) == 0
    assert "\nprecision   bf16, on " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        evaluate_run(run, precision="fp16")


def test_so_many_classes_that_their_pairs_would_fill_the_memory(tmp_path: Path) -> None:
    count = 100_000
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, count))
    run = make_run(tmp_path / "run", "given", arch="given", classes=[str(number) for number in range(count)])
    checkpoint = checkpoints.load(run / "checkpoints")
    weights = {name: dict(model.state_dict()) for name in checkpoint.weights}
    progress = {**checkpoint.progress, "step": checkpoint.progress["step"] + 1}
    checkpoints.save(run / "checkpoints", replace(checkpoint, weights=weights, progress=progress))
    labels = np.array([0, 5, count - 1])
    test = ImageSet.of(images_like(3), labels, checkpoint.network["classes"])
    report = evaluate_run(run, model=model, test_set=test)
    assert (report.confusion, len(report.classes), report.classes[5].images) == (None, count, 1)


def test_augmentation_further_sets_and_speed(run: Path, tmp_path: Path) -> None:
    images, labels = images_like(9, seed=4), np.arange(9) % 3
    np.savez(tmp_path / "pair.npz", images=images, labels=labels)
    pairs, out = [f"{tmp_path}/pair.npz"], tmp_path / "out"
    report = evaluate_run(run, which="weights", tta="mirror", pairs=pairs, speed=True, out=out)
    logits = logits_of(run, images, "weights") + logits_of(run, images[:, :, ::-1].copy(), "weights")
    (score,) = report.sets.values()
    assert (score.images, score.accuracy) == (9, (logits.argmax(1).numpy() == labels).mean())
    assert report.score is report.augmented
    assert report.augmented.loss != report.weights["weights"].loss
    assert [one.batch_size for one in report.speed] == list(module.SPEED_SIZES["cpu"])
    for one in report.speed:
        assert one.images_per_second == pytest.approx(one.batch_size / one.latency_seconds)
    assert (out / "evaluation.json").exists()
    assert not (run / "evaluation").exists()


def test_an_ensemble(ensemble: Path, data: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pair.npz", images=images_like(9, seed=4), labels=np.arange(9) % 3)
    report, test = evaluate_run(ensemble, pairs=[f"{tmp_path}/pair.npz"]), load_dataset(str(data), "test")
    assert (report.chosen, list(report.weights)) == ("ensemble", ["seed0 ema-0.999", "seed2 weights", "ensemble"])
    for (seed, name), score in zip(VOTERS, report.weights.values(), strict=False):
        alone = logits_of(ensemble / f"seed{seed}", test.images, name)
        assert score.accuracy == (alone.argmax(1) == test.labels).double().mean().item()
    mean = mean_of_voters(ensemble, test.images)
    assert report.score.accuracy == (mean.argmax(1) == test.labels).double().mean().item()
    assert report.score.loss == pytest.approx(F.nll_loss(mean.log(), test.labels).item(), rel=1e-5)
    given = mean.argmax(1)
    assert report.confusion == [[int(((given == k) & (test.labels == i)).sum()) for k in range(3)] for i in range(3)]
    assert report.calibration.fitted_on == "validation"
    train = load_dataset(str(data), "train")
    _, apart = validation_split(train.labels, 20, 0, 3)
    fitted = fit_temperature(mean_of_voters(ensemble, train.images[apart]).log(), train.labels[apart])
    assert report.calibration.temperature == pytest.approx(fitted, rel=1e-3)
    (score,) = report.sets.values()
    other = mean_of_voters(ensemble, images_like(9, seed=4))
    assert score.accuracy == (other.argmax(1) == torch.arange(9) % 3).double().mean().item()
    assert json.loads((ensemble / "evaluation" / "evaluation.json").read_text())["chosen"] == "ensemble"


def test_a_network_and_images_that_were_given(tmp_path: Path, data: Path) -> None:
    run, test = make_run(tmp_path / "run", "given", arch="given", val_split=20), load_dataset(str(data), "test")
    with pytest.raises(FastcifarError, match="network was given in Python"):
        evaluate_run(run, test_set=test)
    with pytest.raises(DataError, match="images were given in Python"):
        evaluate_run(run, model=small_network())
    report = evaluate_run(run, model=small_network(), test_set=test, out=tmp_path / "given")
    known = evaluate_run(make_run(tmp_path / "known", data))
    assert report.dataset == "test_set"
    assert [(name, one.accuracy, one.loss) for name, one in report.weights.items()] == [
        (name, one.accuracy, one.loss) for name, one in known.weights.items()
    ]


def test_another_data_set_than_the_runs(tmp_path: Path, data: Path) -> None:
    other = make_run(tmp_path / "other", data, classes=["ant", "bee", "cow"])
    with pytest.raises(FastcifarError, match="was trained on other classes than"):
        evaluate_run(other)
    larger = make_run(tmp_path / "larger", data, options=OPTIONS)  # of images of 32 pixels
    with pytest.raises(FastcifarError, match=f"was trained on 32x32 images and .* has {SIZE}x{SIZE}"):
        evaluate_run(larger)


def test_images_that_have_changed_are_told(tmp_path: Path, data: Path) -> None:
    """The temperature is not fitted on changed images either, and an export is not checked on them."""
    digests = {split: load_dataset(str(data), split).digest() for split in ("train", "test")}
    same = make_run(tmp_path / "same", data, val_split=20, images=digests)
    other = make_run(tmp_path / "other", data, val_split=20, images=dict.fromkeys(digests, "0" * 64))
    for run, expected, fitted_on in ((same, True, "validation"), (other, False, "test")):
        report = evaluate_run(run)
        assert (report.same_images, report.calibration.fitted_on) == (expected, fitted_on)
        first = next(lines_of(report))
        assert first.startswith("images      not the test images that the run had: ") is not expected
    assert evaluate_run(make_run(tmp_path / "older", data)).same_images is None
    assert export_run(same, "safetensors").check.score
    assert not export_run(other, "safetensors").check.score


def test_a_bad_pair_is_told_before_the_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "classify", lambda *_: pytest.fail("too late"))
    with pytest.raises(DataError, match="does not exist"):
        evaluate_run(run, pairs=["nowhere.npz"])


def test_the_command(run: Path, ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), "--tta", "mirror-shift", "--per-class"]) == 0
    printed = capsys.readouterr().out
    starts = "weights     test accuracy ", "ema-0.999   test accuracy", "mirror-shift  test accuracy"
    for text in (*starts, "points over ema-0.999", "fitted on the test set", "bee, wild"):
        assert text in printed
    assert printed.endswith(f"pictures    {run}/evaluation\n")
    assert cli.main(["eval", str(ensemble), "--tta", "mirror"]) == 0
    starts = ["seed0 ema-0.999  test", "seed2 weights    test", "ensemble         test", "mirror           test"]
    assert [line[:21] for line in capsys.readouterr().out.splitlines()[:4]] == starts
