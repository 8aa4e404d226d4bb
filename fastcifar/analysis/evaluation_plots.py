"""Pictures of how a network classifies a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastcifar.analysis.picture import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGIBLE = 20
"""Classes up to which a matrix shows its numbers."""
LARGEST, SMALLEST_FONT = 20.0, 5.0
"""Inches a side of a matrix, and points of the names of its classes, which are left out where they would be smaller."""
COLUMNS = 6


def plot_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts int (K, K), a row for each label and a column for each prediction, beside the pairs that are confused most
    often.

    The diagonal is grey, so that the shades, which are shares of the label's images, tell the mistakes apart.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    count, legible = len(classes), len(classes) <= LEGIBLE
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    wrong = np.ma.masked_array(share, np.eye(count, dtype=bool))
    side = min(max(0.5 * count, 2.0) if legible else 0.13 * count, LARGEST)
    figure = Figure(figsize=(side + 6.5, side + 2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    shades = axes.imshow(wrong, cmap="Reds", norm=PowerNorm(0.5, 0, max(wrong.max(), 0.01)))
    axes.set(xlabel="prediction", ylabel="label")
    font = min(0.75 * 72 * side / count, 9)
    if font >= SMALLEST_FONT:
        names = [shortened(name, 14) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, fontsize=font, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=font, parse_math=False)
    if legible:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                dark = row != column and shades.norm(share[row, column]) > 0.6
                axes.text(
                    column, row, str(number), ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
    else:
        figure.colorbar(
            shades,
            location="bottom",
            label="share of the label's images",
            format=PercentFormatter(1),
            shrink=0.5,
            pad=0.01,
        )
    list_worst_pairs(axes, confusion, classes, 5 if legible else 12)
    return figure


def list_worst_pairs(axes: Axes, confusion: np.ndarray, classes: Sequence[str], count: int) -> None:
    """Names, right of the matrix, the pairs of label and prediction that the most images fall on."""
    from matplotlib.lines import Line2D

    wrong = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    worst = np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:count], wrong.shape)
    lines = [
        f"{shortened(classes[label], 16)} → {shortened(classes[given], 16)}: {wrong[label, given]:,}"
        for label, given in zip(*worst, strict=True)
        if wrong[label, given]
    ]
    if lines:
        nothing = [Line2D([], [], linestyle="none")] * len(lines)
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "borderaxespad": 0, "alignment": "left"}
        legend = axes.legend(
            nothing, lines, title="label → prediction: images", handlelength=0, handletextpad=0, **place
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def plot_reliability(
    series: dict[str, Sequence[tuple[float, float, float]]],
    counts: Sequence[int],
) -> Figure:
    """Accuracy over confidence, beside the diagonal of a calibrated network.

    Args:
        series: for each label of the legend, points of confidence, accuracy and share of the images.
        counts: images in each bin of the first series, of equal width over 0 to 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="grey", linestyle="--", label="calibrated")
    for label, points in series.items():
        confidence, accuracy, share = zip(*points, strict=True)
        (line,) = upper.plot(confidence, accuracy, label=label)
        upper.scatter(confidence, accuracy, s=[10 + 200 * value for value in share], color=line.get_color(), alpha=0.6)
    upper.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    upper.legend()
    lower.bar([(i + 0.5) / len(counts) for i in range(len(counts))], counts, width=0.9 / len(counts))
    lower.set(xlabel="confidence", ylabel="images", yscale="log")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def plot_mistakes(images: np.ndarray, captions: Sequence[str]) -> Figure:
    """Images uint8 (N, H, W, 3), N at least 1, each with its caption above it."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.8 * rows), layout="constrained")
    figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=8, loc="left", parse_math=False)
    return figure
