"""Pictures: what they show, that all of it fits, and that a failing one does no other harm."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from made_run import RESULT, make_run, record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastcifar import plots
from fastcifar.config import ScheduleConfig
from fastcifar.engine.run import draw_curves
from fastcifar.errors import FastcifarError
from fastcifar.optim.schedules import lr_table
from fastcifar.plots import applied_lr, draw, plot_confusion, plot_curves, plot_images, plot_lr, plot_run, save
from fastcifar.runs.console import Console
from fastcifar.runs.folder import Run

AVERAGES = {"ema-0.99": 0.62, "ema-0.999": 0.62}
NAMES = [
    "猫咪動物園的大熊貓和小熊貓都很可愛喔",
    "$\\frac{$",
    "_private_",
    "W" * 80,
    "two\nlines",
    "😀",
    "Über",
    "\udcff\x1b[31m",
]


def titled(title: str) -> Figure:
    figure = Figure()
    figure.suptitle(title)
    return figure


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def test_a_picture_is_drawn_into_a_new_folder(tmp_path):
    assert draw(tmp_path / "new" / "a.png", titled, "hello") is None
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("patched", "error"),
    [
        ("matplotlib.figure.Figure.savefig", RuntimeError("the font is gone.")),
        ("matplotlib.figure.Figure.suptitle", RuntimeError("the font is gone.")),
        ("fastcifar.runs.files.os.fsync", OSError(28, "the font is gone")),
    ],
)
def test_a_failure_is_one_line_and_leaves_what_was_there(patched, error, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise error

    path = tmp_path / "a.png"
    path.write_text("an earlier picture")
    monkeypatch.setattr(patched, fail)
    assert draw(path, titled, "hello") == "a.png was not drawn (the font is gone)."
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.png", "an earlier picture")]
    with pytest.raises(FastcifarError, match=r"a\.png cannot be (drawn|written) \(the font is gone\); "):
        save(path, titled, "hello")


def test_the_backend_that_a_notebook_names_does_not_matter(tmp_path):
    """Afterwards it is the user's own pyplot's, where there is such a backend."""
    code = "import os, sys; from pathlib import Path; from fastcifar.plots import draw, plot_lr\n"
    code += "print(draw(Path('a.png'), plot_lr, [0.1], 1, [])); import matplotlib\n"
    code += "print(os.environ['MPLBACKEND'], matplotlib.get_backend(auto_select=False))"
    for backend, later in (("nowhere", "None"), ("module://nowhere", "module://nowhere")):
        environment = os.environ | {"MPLBACKEND": backend}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.splitlines() == ["None", f"{backend} {later}"], done.stderr


def test_a_short_name_fits_whatever_its_letters():
    assert plots.shortened("automobile", 5) == "auto…"
    assert plots.shortened("a\nb\tc", 5) == "a b c"
    assert len(plots.shortened("猫咪動物園", 5)) <= 4, "its letters are twice as wide"


def records(epochs: int, table: list[float]):
    """Makes records of four steps each, with a validation split and two averages of the same accuracy."""
    validated = {"validation_loss": 1.2, "validation_accuracy": 0.6, "averaged_validation_accuracies": AVERAGES}
    return [record(n, epochs=epochs, lr=table[4 * n - 1], train_loss=2 / n, **validated) for n in range(1, epochs + 1)]


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


@pytest.mark.parametrize(("epochs", "scale"), [(1, "linear"), (200, "log")])
def test_every_curve_is_there_and_can_be_told_from_the_others(epochs, scale):
    table = lr_table(ScheduleConfig(warmup="2st"), 0.1, 4, epochs)
    result = replace(RESULT, averaged_test_accuracies={"ema-0.99": 0.25, "ema-0.999": 0.25}, chosen_epochs={})
    figure = drawn(plot_curves(records(epochs, table), table, "r1_$x_y$-" + "long" * 50, result))
    title, shown = figure.get_suptitle(), panels(figure)
    assert (title[:13], title[-1]) == ("r1_$x_y$-long", "…")
    assert ("the end, without training accuracy (%)" in shown) == (epochs == 200)
    curves = shown["accuracy (%)"].lines[:4]
    names = ["train", "validation", "validation, ema-0.99", "validation, ema-0.999"]
    assert [line.get_label() for line in curves] == names
    assert len({(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in curves}) == 4
    assert curves[1].get_linewidth() > curves[2].get_linewidth(), "so that what lies upon it leaves it visible"
    assert all(len(line.get_xdata()) == epochs for line in curves)
    assert list(curves[1].get_ydata()) == pytest.approx([60.0] * epochs)
    assert all(line.get_marker() not in (None, "None") for line in curves) == (epochs == 1)
    assert shown["learning rate"].lines[0].get_ydata().tolist() == table, "of every step"
    assert shown["loss"].get_yscale() == scale
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7


def test_what_the_run_came_to_is_marked_where_it_comes_from():
    table = lr_table(ScheduleConfig(), 0.1, 4, 3)
    result = replace(RESULT, chosen_epochs={"weights": 1, "ema-0.999": 2})
    marks = panels(plot_curves(records(3, table), table, "a run", result))["accuracy (%)"].lines[4:]
    assert {mark.get_label(): (*mark.get_xdata(), *mark.get_ydata()) for mark in marks} == {
        "final test, weights: 50.00% (best epoch 1)": (1, 50.0),
        "final test, ema-0.999: 25.00% (best epoch 2)": (2, 25.0),
    }
    last = plot_curves(records(3, table), table, "a run", replace(RESULT, chosen_epochs={}))
    assert "final test, weights: 50.00% (last epoch 3)" in [text.get_text() for text in last.legends[0].get_texts()]


def test_the_applied_rate_is_the_tables_but_where_a_plateau_lowered_it():
    table = lr_table(ScheduleConfig("step", warmup="2st"), 0.1, 4, 3)
    assert applied_lr(records(3, table), table) == table
    lowered = [record(n, lr=factor * table[4 * n - 1]) for n, factor in ((1, 1), (2, 0.5), (3, 0.25))]
    expected = table[:4] + [0.5 * lr for lr in table[4:8]] + [0.25 * lr for lr in table[8:]]
    assert applied_lr(lowered, table) == pytest.approx(expected)


def test_the_curves_of_a_folder(tmp_path, capsys):
    """The run has two epochs of four steps; damage costs only the picture, and a run without an epoch has none."""
    run = make_run(tmp_path / "my_run")
    figure = plot_run(run)
    assert figure.get_suptitle() == "my_run: resnet"
    assert len(panels(figure)["learning rate"].lines[0].get_xdata()) == 8
    draw_curves(run, Console())
    assert (run.path / "curves.png").exists()
    (run.path / "config.json").write_text("{")
    draw_curves(run, Console())
    assert capsys.readouterr().out.startswith("curves.png was not drawn (")
    (tmp_path / "empty").mkdir()
    draw_curves(Run(tmp_path / "empty"), Console())
    assert not list((tmp_path / "empty").iterdir())


def test_the_learning_rate_of_a_plan():
    axes = drawn(plot_lr([0.1, 0.2, 0.3, 0.2], 2, [2])).axes[0]
    rate, kinks = axes.lines
    assert rate.get_xydata().tolist() == [[0, 0.1], [0.5, 0.2], [1, 0.3], [1.5, 0.2]]
    assert kinks.get_xydata().tolist() == [[1, 0.3]]


def test_the_split_of_a_step():
    figure = drawn(plots.plot_split({"forward": 1e-3, "idle": 2e-3}, {"arithmetic": 5e-4}, "a step of $x_{"))
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0, 1), (1, 2)]
    entries = {text.get_text() for text in figure.legends[0].get_texts()}
    assert entries == {"forward 1 ms", "idle 2 ms", "floor by arithmetic 0.5 ms"}


def confusion_of(count: int) -> np.ndarray:
    """Makes a hundred images a class, of which its number, at most twelve, are taken for the next class."""
    wrong = np.minimum(np.arange(count), 12)
    matrix = np.diag(100 - wrong)
    matrix[np.arange(count), (np.arange(count) + 1) % count] += wrong
    return matrix


@pytest.mark.parametrize(
    ("count", "numbers", "pairs", "worst"),
    [(2, 3, 1, "class_1 → class_0: 1"), (10, 19, 5, "class_9 → class_0: 9"), (100, 0, 12, "class_12 → class_13: 12")],
)
def test_the_confusions_are_named(count, numbers, pairs, worst):
    classes = [f"class_{number}" for number in range(count)]
    axes = plot_confusion(confusion_of(count), classes).axes[0]
    assert len(axes.texts) == numbers + 1
    assert [label.get_text() for label in axes.get_yticklabels()] == classes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "label")
    lines = axes.texts[-1].get_text().splitlines()
    assert (len(lines), lines[1]) == (1 + pairs, worst)


def test_the_shades_are_of_the_mistakes():
    (shades,) = plot_confusion(confusion_of(100), [str(n) for n in range(100)]).axes[0].images
    assert shades.get_array().mask.diagonal().all()
    assert shades.norm.vmax == pytest.approx(0.12)
    assert shades.norm(0.01) > 0.2, "a hundredth shows"
    assert drawn(plot_confusion(np.diag([5, 0]), ["a", "b"])).axes[0].texts[-1].get_text() == "", "no mistakes"


@pytest.mark.parametrize("count", [7, 100])
@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_names_of_any_kind_fit(count):
    figure = drawn(plot_confusion(confusion_of(count), (NAMES * count)[:count]))
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 + 3 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert min(label.get_window_extent().y0 for label in axes.get_xticklabels()) >= 0
    assert axes.texts[-1].get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("bins", [1, 15])
def test_reliability(bins):
    series = {"as it is": [(n / 20, n / 30, 1 / bins) for n in range(1, bins + 1)], "scaled": [(0.5, 0.5, 1.0)]}
    upper, lower = drawn(plots.plot_reliability(series, [100] * bins + [0])).axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["calibrated", "as it is", "scaled"]
    assert [bar.get_height() for bar in lower.patches] == [100] * bins + [0]


@pytest.mark.parametrize("count", [1, 8])
def test_images_and_their_captions_stand_beside_each_other(count):
    images = np.arange(2 * count * 5 * 4 * 3, dtype=np.uint8).reshape(2, count, 5, 4, 3)
    caption = "label: $cat_{\npredicted: WWWWWWWWWWW… 100%\nimage 9999"
    figure = drawn(plot_images(images, [caption] * count, "$a_{"))
    axes = figure.axes[0]
    mosaic, texts = axes.images[0].get_array(), axes.texts
    for number, text in enumerate(texts):
        x, y = (round(place + 0.5) for place in text.xy)
        assert np.array_equal(mosaic[y : y + 5, x : x + 4], images[0, number])
        assert np.array_equal(mosaic[y + 6 : y + 11, x : x + 4], images[1, number])
    boxes = [text.get_window_extent() for text in texts]
    assert all(left.x1 < right.x0 or left.y0 > right.y1 for left, right in pairwise(boxes))
    assert boxes[0].y1 < axes.title.get_window_extent().y0 or count == 1
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


@pytest.mark.parametrize("shape", [(200, 90), (1, 1), (3, 40)])
def test_images_of_any_size_stand_beside_their_labels(shape):
    labels = ["original", "crop:4, flip:0.5, rotate:15,\ntranslate:0.1"]
    figure = drawn(plot_images(np.zeros((2, 3, *shape, 3), np.uint8), ["ant"] * 3, labels=labels))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert min(label.get_window_extent().x0 for label in axes.get_yticklabels()) >= 0
