"""Pictures are whole or absent, and what keeps one from being drawn costs nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastcifar import cli
from fastcifar.analysis.picture import draw, save, shortened
from fastcifar.errors import FastcifarError


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("the font\nis gone.")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def titled(title: str) -> Figure:
    figure = Figure()
    figure.suptitle(title)
    return figure


def test_a_picture_is_drawn_into_a_new_folder(tmp_path: Path) -> None:
    assert draw(tmp_path / "new" / "a.png", titled, "hello") is None
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("patched", "replacement", "reason"),
    [
        (f"{FigureCanvasAgg.__module__}.FigureCanvasAgg.print_png", fail, "the font is gone"),
        ("matplotlib.figure.Figure.suptitle", fail, "the font is gone"),
        ("fastcifar.runs.files.os.fsync", full_disk, "No space left on device"),
    ],
)
def test_a_failure_is_one_line_and_leaves_what_was_there(
    patched, replacement, reason, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "a.png"
    path.write_text("an earlier picture")
    monkeypatch.setattr(patched, replacement)
    assert draw(path, titled, "hello") == f"a.png was not drawn ({reason})."
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.png", "an earlier picture")]
    with pytest.raises(FastcifarError, match=rf"a\.png cannot be (drawn|written) \({reason}\); "):
        save(path, titled, "hello")


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    def stopped() -> Figure:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "a.png", stopped)


BACKENDS = """
import os, sys
from pathlib import Path
from fastcifar.analysis.picture import draw

def plot():
    from matplotlib.figure import Figure
    return Figure()

print(draw(Path(sys.argv[1]), plot))
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.get_backend(auto_select=False))
"""


@pytest.mark.parametrize(
    ("backend", "later"), [("nowhere", "None"), ("module://nowhere", "module://nowhere"), ("svg", "svg")]
)
def test_the_backend_that_a_notebook_names_does_not_matter(backend: str, later: str, tmp_path: Path) -> None:
    """And it is the user's own pyplot's afterwards, where there is such a backend."""
    command = [sys.executable, "-c", BACKENDS, str(tmp_path / "a.png")]
    done = subprocess.run(command, env=os.environ | {"MPLBACKEND": backend}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None", f"{backend} {later}"]
    assert (tmp_path / "a.png").exists()


def test_plan_prints_without_its_picture(tmp_path: Path, monkeypatch, capsys) -> None:
    command = "plan --arch resnet --blocks 1 --channels 4 --device cpu --dataset synthetic --epochs 1"
    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    assert cli.main([*command.split(), "--out", str(tmp_path / "plan.png")]) == 0
    printed = capsys.readouterr().out
    assert "resnet, 470 parameters" in printed
    assert printed.endswith("plan.png was not drawn (the font is gone).\n")
    assert not list(tmp_path.iterdir())


def test_preview_is_nothing_without_its_picture(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    assert cli.main(["preview", "standard", "--dataset", "synthetic", "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "a.png cannot be drawn (the font is gone); see whether" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_short_name_fits_whatever_its_letters() -> None:
    assert shortened("cat", 5) == "cat"
    assert shortened("automobile", 5) == "auto…"
    assert shortened("a\nb\tc", 5) == "a b c"
    assert len(shortened("猫咪動物園", 5)) <= 4, "its letters are twice as wide"
