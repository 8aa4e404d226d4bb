"""Predictions: what the file says, in which order, and that it is whole or absent."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import CLASSES, MEAN, OPTIONS, SIZE, STD, images_like, make_run, make_weights

from fastcifar import cli
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.inference import classifier
from fastcifar.inference.predict import predict
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", images_like(11, seed=5))
    return tmp_path / "images.npy"


def expected_probabilities(images: Path, *seeds: int) -> torch.Tensor:
    """In float64, from first principles: the mean of the networks' softmax, (N, classes)."""
    pixels = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    shares = []
    for seed in seeds:
        model = build_model("resnet", classes=len(CLASSES), image_size=SIZE, **OPTIONS)
        model.load_state_dict(make_weights(seed))
        with torch.no_grad():
            shares.append(model.double().eval()((pixels - mean) / std).softmax(1))
    return torch.stack(shares).mean(0)


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 250])
def test_one_run(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    monkeypatch.setattr(classifier.Classifier, "batch_size", batch_size)
    out = tmp_path / "predictions.csv"
    assert predict([run], images, out) == 11
    winners = expected_probabilities(images, 1).argmax(1).tolist()
    assert len(set(winners)) > 1
    assert rows_of(out) == [["index", "prediction"], *([str(i), CLASSES[winner]] for i, winner in enumerate(winners))]
    assert b"\r" not in out.read_bytes()


def test_several_runs_with_probabilities(run: Path, data: Path, images: Path, tmp_path: Path) -> None:
    other, out = make_run(tmp_path / "other", data, seed=7), tmp_path / "predictions.csv"
    predict([run, other], images, out, which="weights", probabilities=True)
    header, *rows = rows_of(out)
    assert header == ["index", "prediction", *CLASSES]
    expected = expected_probabilities(images, 0, 7)
    found = torch.tensor([[float(value) for value in row[2:]] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [row[1] for row in rows] == [CLASSES[winner] for winner in expected.argmax(1)]


def test_test_time_augmentation_reads_the_mirror_image(run: Path, images: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mirrored.npy", np.load(images)[:, :, ::-1])
    for name, source in (("a", images), ("b", tmp_path / "mirrored.npy")):
        predict([run], source, tmp_path / name, tta="mirror", probabilities=True)
    values = [[[float(value) for value in row[2:]] for row in rows_of(tmp_path / name)[1:]] for name in "ab"]
    np.testing.assert_allclose(*values, atol=2e-6)


def test_equal_probabilities_go_to_the_lower_label(run: Path, images: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.load(run / "checkpoints")
    for weights in checkpoint.weights.values():
        for part in ("weight", "bias"):
            weights[f"classifier.{part}"].zero_()
    checkpoint.progress["step"] += 1
    checkpoints.save(run / "checkpoints", checkpoint)
    predict([run], images, tmp_path / "out.csv")
    assert {row[1] for row in rows_of(tmp_path / "out.csv")[1:]} == {CLASSES[0]}


def test_a_failure_leaves_what_was_there(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "predictions.csv"
    out.write_text("old")
    monkeypatch.setattr(classifier.Classifier, "batch_size", 4)
    whole, calls = classifier.Classifier.logits, []

    def failing(self: classifier.Classifier, *arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(classifier.Classifier, "logits", failing)
    with pytest.raises(KeyboardInterrupt):
        predict([run], images, out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "images.npy", "predictions.csv", "run"]


def test_places_that_cannot_be_written(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(FastcifarError, match=r"cannot be written \(No such file or directory\)"):
        predict([run], images, tmp_path / "nowhere" / "out.csv")
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        predict([run], images, tmp_path)
    with pytest.raises(ConfigError, match="is where the images are"):
        predict([run], images, images)


def test_runs_that_do_not_agree(run: Path, data: Path, images: Path, tmp_path: Path) -> None:
    reordered = make_run(tmp_path / "reordered", data, classes=list(reversed(CLASSES)))
    with pytest.raises(ConfigError, match=f"{reordered} knows other classes than {run}"):
        predict([run, reordered], images, tmp_path / "out.csv")
    larger = make_run(tmp_path / "larger", data, options=OPTIONS | {"image_size": 16})
    with pytest.raises(ConfigError, match=f"{larger} takes images of 16 pixels a side and {run} 8"):
        predict([run, larger], images, tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="no run to predict with"):
        predict([], images, tmp_path / "out.csv")


def test_a_run_that_diverged(run: Path, images: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.load(run / "checkpoints")
    checkpoint.weights["weights"]["classifier.bias"][0] = float("nan")
    checkpoint.progress["step"] += 1
    checkpoints.save(run / "checkpoints", checkpoint)
    with pytest.raises(FastcifarError, match=f"{run}'s network gives infinite or NaN outputs"):
        predict([run], images, tmp_path / "out.csv", which="weights")
    assert not (tmp_path / "out.csv").exists()


def test_the_command(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    command = ["predict", str(run), str(run), "--images", str(images), "--out", str(out), "--tta", "mirror-shift", "--probabilities"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"11 predictions in {out}\n"
    assert len(rows_of(out)) == 12
    assert cli.main(["predict", str(run), "--images", str(data_of(run))]) == 2
    assert "name the array to classify images" in capsys.readouterr().err


def data_of(run: Path) -> Path:
    return run.parent / "data.npz"
