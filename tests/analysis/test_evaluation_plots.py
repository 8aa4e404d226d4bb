"""The pictures of an evaluation: what they say, for few and many classes, whatever these are called."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fastcifar.analysis.evaluation_plots import plot_confusion, plot_mistakes, plot_reliability
from fastcifar.analysis.picture import draw

NAMES = [
    "猫咪動物園的大熊貓和小熊貓都很可愛喔",
    "$\\frac{$",
    "_private_",
    "Übergrößenträger",
    "W" * 80,
    "two\nlines",
    "😀",
]


def confusion_of(count: int) -> np.ndarray:
    """A hundred images of each class, of which so many as the label's number are taken for the next class, twelve at
    most.
    """
    wrong = np.minimum(np.arange(count), 12)
    matrix = np.diag(100 - wrong)
    matrix[np.arange(count), (np.arange(count) + 1) % count] += wrong
    return matrix


@pytest.mark.parametrize(("count", "numbers", "pairs"), [(2, 3, 1), (10, 19, 5), (100, 0, 12)])
def test_the_confusions_are_named(count, numbers, pairs, tmp_path):
    classes = [f"class_{number}" for number in range(count)]
    figure = plot_confusion(confusion_of(count), classes)
    matrix = figure.axes[0]
    assert len(matrix.texts) == numbers
    assert [label.get_text() for label in matrix.get_yticklabels()] == classes
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("prediction", "label")
    lines = [text.get_text() for text in matrix.get_legend().get_texts()]
    assert len(lines) == pairs
    assert lines[0] == {2: "class_1 → class_0: 1", 10: "class_9 → class_0: 9", 100: "class_12 → class_13: 12"}[count]
    assert draw(tmp_path / "confusion.png", plot_confusion, confusion_of(count), classes) is None


def test_the_shades_are_of_the_mistakes():
    (shades,) = plot_confusion(confusion_of(100), [str(n) for n in range(100)]).axes[0].images
    assert shades.get_array().mask.diagonal().all()
    assert shades.norm.vmax == pytest.approx(0.12)
    assert shades.norm(0.01) > 0.2, "a hundredth shows"


def test_no_confusions_at_all(tmp_path):
    assert plot_confusion(np.diag([5, 5]), ["a", "b"]).axes[0].get_legend() is None
    assert draw(tmp_path / "a.png", plot_confusion, np.diag([5, 0]), ["a", "b"]) is None


@pytest.mark.parametrize("count", [7, 100])
@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_names_of_any_kind_fit(count):
    """Between their neighbours, and on the picture."""
    figure = plot_confusion(confusion_of(count), (NAMES * count)[:count])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, matrix = canvas.get_renderer(), figure.axes[0]
    boxes = [label.get_window_extent(renderer) for label in matrix.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 + 3 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert min(label.get_window_extent(renderer).y0 for label in matrix.get_xticklabels()) >= 0
    assert matrix.get_legend().get_window_extent(renderer).x1 <= figure.bbox.x1


@pytest.mark.parametrize("count", [1, 24])
def test_mistakes_have_their_captions_beside_each_other(count):
    caption = "label: $cat_{\npredicted: WWWWWWWWWWW… 100%\nimage 9999"
    figure = plot_mistakes(np.zeros((count, 32, 32, 3), np.uint8), [caption] * count)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [caption] * count
    boxes = [axes._left_title.get_window_extent(canvas.get_renderer()) for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes[:6]))
    assert boxes[min(count, 6) - 1].x1 <= figure.bbox.x1


@pytest.mark.parametrize("bins", [1, 15])
def test_reliability(bins, tmp_path):
    series = {"as it is": [(n / 20, n / 30, 1 / bins) for n in range(1, bins + 1)], "scaled": [(0.5, 0.5, 1.0)]}
    assert draw(tmp_path / "a.png", plot_reliability, series, [100] * bins + [0]) is None
    upper, _ = plot_reliability(series, [100] * bins + [0]).axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["calibrated", "as it is", "scaled"]
