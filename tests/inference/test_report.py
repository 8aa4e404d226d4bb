"""The files of an evaluation, and the mistakes that its picture shows."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastcifar.inference import report as module
from fastcifar.inference.evaluate import evaluate_run
from fastcifar.inference.report import worst_mistakes


def test_the_files_and_a_picture_that_cannot_be_drawn(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture of an earlier evaluation does not stay beside the numbers of a later one."""
    report = evaluate_run(run)
    files = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}
    stored = json.loads(files.pop("evaluation.json"))
    assert sorted(files) == ["confusion.png", "mistakes.png", "reliability.png"]
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    assert stored["weights"]["weights"]["accuracy"] == report.weights["weights"].accuracy
    assert len(stored["calibration"]["bins"]) == 15
    monkeypatch.setattr(module, "plot_confusion", mock.Mock(side_effect=ValueError("no fonts")))
    evaluate_run(run)
    assert capsys.readouterr().err == "confusion.png was not drawn (no fonts).\n"
    names = sorted(path.name for path in (run / "evaluation").iterdir())
    assert names == ["evaluation.json", "mistakes.png", "reliability.png"]


def test_mistakes_are_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISTAKES", 4)
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.99, 0.01], [0.5, 0.5]])
    worst, captions = worst_mistakes(probabilities.log(), torch.tensor([1, 0, 0, 0, 1]), ("ant", "bee"))
    assert worst.tolist() == [0, 1, 2, 4]
    assert captions[0] == "label: bee\npredicted: ant 90%\nimage 0"
    assert [caption.split("\n")[2] for caption in captions] == ["image 0", "image 1", "image 2", "image 4"]
