"""The files of an evaluation, and the mistakes that its picture shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastcifar.inference import report as module
from fastcifar.inference.evaluate import evaluate_run
from fastcifar.inference.report import worst_mistakes


def test_the_files(run: Path) -> None:
    report = evaluate_run(run)
    names = sorted(path.name for path in (run / "evaluation").iterdir())
    assert names == ["confusion.png", "evaluation.json", "mistakes.png", "reliability.png"]
    for name in names:
        content = (run / "evaluation" / name).read_bytes()
        assert content.startswith(b"{" if name.endswith("json") else b"\x89PNG")
    stored = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert stored["weights"]["weights"]["accuracy"] == report.weights["weights"].accuracy
    assert len(stored["calibration"]["bins"]) == 15


def test_pictures_that_cannot_be_drawn_cost_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "confusion.png").write_text("of an earlier evaluation")

    def broken(*_: object) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(module, "plot_confusion", broken)
    report = evaluate_run(run, out=tmp_path / "out")
    assert capsys.readouterr().err == "confusion.png was not drawn (no fonts).\n"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["evaluation.json", "mistakes.png", "reliability.png"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["chosen"] == report.chosen


def test_mistakes_are_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MISTAKES", 4)
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.99, 0.01], [0.5, 0.5]])
    worst, captions = worst_mistakes(probabilities.log(), torch.tensor([1, 0, 0, 0, 1]), ("ant", "bee"))
    assert worst.tolist() == [0, 1, 2, 4]
    assert captions[0] == "label: bee\npredicted: ant 90%\nimage 0"
    assert [caption.split("\n")[2] for caption in captions] == ["image 0", "image 1", "image 2", "image 4"]
