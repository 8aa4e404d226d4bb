"""Predictions: what the file says, in which order, and that it is whole or absent."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small_run import CLASSES, MEAN, OPTIONS, STD, images_like, make_run, make_weights, small_network

from fastcifar import cli
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.inference.classifier import Classifier
from fastcifar.inference.predict import TableForm, predict, write_predictions
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.network import DEFAULT, LoadOptions

LAST = LoadOptions("weights")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", images_like(11, seed=5))
    return tmp_path / "images.npy"


def expected_probabilities(images: Path | np.ndarray, *seeds: int) -> torch.Tensor:
    """Computes in float64, from first principles, the mean of the networks' softmax, (N, classes)."""
    pixels = torch.from_numpy(np.array(images if isinstance(images, np.ndarray) else np.load(images)))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    normalised = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    shares = []
    for seed in seeds:
        model = small_network()
        model.load_state_dict(make_weights(seed))
        with torch.no_grad():
            shares.append(model.double().eval()(normalised).softmax(1))
    return torch.stack(shares).mean(0)


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def shares_of(path: Path) -> torch.Tensor:
    return torch.tensor([[float(value) for value in row[2:]] for row in rows_of(path)[1:]], dtype=torch.float64)


def test_a_leaderboards_columns_and_numbers(run: Path, images: Path, tmp_path: Path) -> None:
    command = ["predict", str(run), "--images", str(images), "--out", str(tmp_path / "named.csv")]
    assert cli.main(command) == 0
    given = ["--labels", "index", "--columns", "id,label", "--out", str(tmp_path / "numbered.csv")]
    assert cli.main([*command[:-2], *given]) == 0
    (_, *named), (titles, *numbered) = rows_of(tmp_path / "named.csv"), rows_of(tmp_path / "numbered.csv")
    assert titles == ["id", "label"]
    assert numbered == [[index, str(CLASSES.index(name))] for index, name in named]
    for columns in ("id", "id,", "id,label,more"):
        with pytest.raises(ConfigError, match="give the titles of two, such as id,label"):
            TableForm(columns)


def change_weights(run: Path, name: str, key: str, value: float, part: slice | int = slice(None)) -> None:
    checkpoint = checkpoints.load(run / "checkpoints")
    checkpoint.weights[name][key][part] = value
    checkpoint.progress["step"] += 1
    checkpoints.save(run / "checkpoints", checkpoint)


@pytest.mark.parametrize("batch_size", [1, 4, 250])
def test_the_table(
    run: Path, data: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """It is of one run, and then of two with probabilities."""
    monkeypatch.setattr(Classifier, "batch_size", batch_size)
    other, out = make_run(tmp_path / "other", data, seed=7), tmp_path / "predictions.csv"
    write_predictions([run], images, out, DEFAULT)
    winners = expected_probabilities(images, 1).argmax(1).tolist()
    assert len(set(winners)) > 1
    assert rows_of(out) == [["index", "prediction"], *([str(i), CLASSES[winner]] for i, winner in enumerate(winners))]
    assert b"\r" not in out.read_bytes()
    write_predictions([run, other], images, out, LAST, form=TableForm(probabilities=True))
    header, *rows = rows_of(out)
    assert header == ["index", "prediction", *CLASSES]
    expected = expected_probabilities(images, 0, 7)
    torch.testing.assert_close(shares_of(out), expected, atol=1e-5, rtol=0)
    assert [row[1] for row in rows] == [CLASSES[winner] for winner in expected.argmax(1)]


def test_test_time_augmentation_reads_the_mirror_image(run: Path, images: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mirrored.npy", np.load(images)[:, :, ::-1])
    for name, source in (("a", images), ("b", tmp_path / "mirrored.npy")):
        write_predictions([run], source, tmp_path / name, DEFAULT, tta="mirror", form=TableForm(probabilities=True))
    torch.testing.assert_close(shares_of(tmp_path / "a"), shares_of(tmp_path / "b"), atol=2e-6, rtol=0)


def test_equal_probabilities_go_to_the_lower_label(run: Path, images: Path, tmp_path: Path) -> None:
    for part in ("weight", "bias"):
        change_weights(run, "ema-0.999", f"classifier.{part}", 0.0)
    write_predictions([run], images, tmp_path / "out.csv", DEFAULT)
    assert {row[1] for row in rows_of(tmp_path / "out.csv")[1:]} == {CLASSES[0]}


def test_a_failure_leaves_what_was_there(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "predictions.csv"
    out.write_text("old")
    monkeypatch.setattr(Classifier, "batch_size", 4)
    monkeypatch.setattr(Classifier, "logits", mock.Mock(side_effect=[torch.zeros(4, 3), KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        write_predictions([run], images, out, DEFAULT)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "images.npy", "predictions.csv", "run"]


def test_refusals(run: Path, data: Path, images: Path, tmp_path: Path) -> None:
    reordered = make_run(tmp_path / "reordered", data, classes=list(reversed(CLASSES)))
    larger = make_run(tmp_path / "larger", data, options=OPTIONS | {"image_size": 16})
    diverged, out = make_run(tmp_path / "diverged", data), tmp_path / "out.csv"
    change_weights(diverged, "weights", "classifier.bias", float("nan"), 0)
    for runs, place, expected in [
        ([run], tmp_path / "nowhere" / "out.csv", r"cannot be written \(No such file or directory\)"),
        ([run], tmp_path, "is a folder; give a file"),
        ([run], images, "is where the images are"),
        ([run, reordered], out, f"{reordered} knows other classes than {run}"),
        ([run, larger], out, f"{larger} takes images of 16 pixels a side and {run} 8"),
        ([], out, "no run to predict with"),
        ([diverged], out, f"{diverged}'s network gives infinite or NaN outputs"),
    ]:
        with pytest.raises(FastcifarError, match=expected):
            write_predictions(runs, images, place, LAST)
    assert not out.exists()


def test_the_command(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture has another size, which is said."""
    picture, out = Image.fromarray(images_like(1, size=12)[0]), tmp_path / "out.csv"
    picture.save(tmp_path / "cat.png")
    command = ["predict", str(run), str(run), "--images", str(tmp_path / "cat.png"), "--out", str(out)]
    assert cli.main([*command, "--probabilities"]) == 0
    line = "1 image of 12x12 was cut to its largest centred square and resized to 8x8."
    assert capsys.readouterr().out == f"{line}\n1 prediction in {out}, computed in fp32\n"
    resized = np.asarray(ImageOps.fit(picture, (8, 8), Image.Resampling.LANCZOS))[None]
    torch.testing.assert_close(shares_of(out), expected_probabilities(resized, 1), atol=1e-5, rtol=0)
    assert cli.main(["predict", str(run), "--images", str(data)]) == 2
    assert "name the array to classify images" in capsys.readouterr().err


def test_pictures_go_by_their_names(run: Path, tmp_path: Path) -> None:
    plain = ["10.png", "2.png", "a, b.png", "deep/er/c.png", "line\nbreak.png", '"quoted".png']
    escaped = {"r\return.png": "r\\return.png", os.fsdecode(b"\xff.png"): "\\udcff.png"}
    escaped |= {f"{first}1.png": f"'{first}1.png" for first in "=+-@\t"} | {"\r1.png": "'\\r1.png"}
    names, folder = [*plain, *escaped], tmp_path / "pictures"
    images = images_like(len(names), seed=3)
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name, "PNG")
    write_predictions([run], folder, tmp_path / "out.csv", DEFAULT)
    winners = expected_probabilities(images, 1).argmax(1).tolist()
    given = {name: CLASSES[winner] for name, winner in zip(names, winners, strict=True)}
    expected = [[escaped.get(name, name), given[name]] for name in sorted(names, key=lambda name: folder / name)]
    assert rows_of(tmp_path / "out.csv") == [["file", "prediction"], *expected]


def test_class_names_are_no_formulas(tmp_path: Path, data: Path, images: Path) -> None:
    names = ("=1+1", "@SUM(A1)", "-plain")
    write_predictions([make_run(tmp_path / "run", data, classes=names)], images, tmp_path / "out.csv", DEFAULT)
    assert {row[1] for row in rows_of(tmp_path / "out.csv")[1:]} <= {f"'{name}" for name in names}


def test_in_memory(run: Path, ensemble: Path, images: Path) -> None:
    """Every network counts the same: the run's, and the two voters of the ensemble, one with the run's own weights."""
    pixels = np.load(images)
    sources = [pixels[:4], torch.from_numpy(pixels[4:9]), Image.fromarray(pixels[9]), Image.fromarray(pixels[10])]
    for runs, seeds in (([str(run), ensemble], (1, 1, 20)), (run, (1,))):
        expected = expected_probabilities(images, *seeds)
        for source in (images, sources):
            found = predict(runs, source)
            assert (found.labels.dtype, found.classes, found.precision) == (torch.int64, CLASSES, "fp32")
            torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=0)
            assert torch.equal(found.labels, expected.argmax(1))
            assert found.names == [CLASSES[winner] for winner in expected.argmax(1)]
    low = predict(run, images, precision="bf16")
    assert low.precision == "bf16"
    assert 1e-5 < (low.probabilities - expected).abs().max() < 0.1


def test_ensembles_that_cannot_vote(ensemble: Path, data: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with pytest.raises(
        ConfigError, match=f"{ensemble} is an ensemble, which says itself which weights .* leave --weights weights out"
    ):
        write_predictions([ensemble], images, out, LAST)
    shutil.rmtree(ensemble / "seed2")
    with pytest.raises(ConfigError, match=f"{ensemble}'s member {ensemble / 'seed2'} is no longer there; put it back"):
        write_predictions([ensemble], images, out, DEFAULT)
    make_run(ensemble / "seed2", data, classes=list(reversed(CLASSES)))
    with pytest.raises(ConfigError, match=f"{ensemble / 'seed2'} knows other classes than {ensemble / 'seed0'}"):
        write_predictions([ensemble], images, out, DEFAULT)
    report = json.loads((ensemble / "ensemble.json").read_text())
    for members, expected in ([], "names no member that votes"), ([4], "names member 4 of 3"):
        report["chosen"]["members"] = members
        (ensemble / "ensemble.json").write_text(json.dumps(report))
        with pytest.raises(ConfigError, match=expected):
            write_predictions([ensemble], images, out, DEFAULT)
    assert not out.exists()


def test_a_network_that_was_given_is_given_again(tmp_path: Path, images: Path) -> None:
    """A copy of it takes the weights; it is left as it was."""
    runs = [make_run(tmp_path / f"run{seed}", "given", seed=seed, arch="given") for seed in (0, 10)]
    with pytest.raises(ConfigError, match=f"{runs[0]}'s network was given in Python .* as model="):
        predict(runs, images)
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    found = predict(runs, images, model=model)
    torch.testing.assert_close(found.probabilities, expected_probabilities(images, 1, 11), atol=1e-5, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FastcifarError, match=r"run0's ema-0\.999 (lacks|has)"):
        predict(runs, images, model=torch.nn.Flatten())
