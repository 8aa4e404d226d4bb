"""Pictures of how a network classifies a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcifar.runs.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGIBLE = 20
"""Classes up to which a matrix shows its numbers and names."""
COLUMNS = 6


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Counts int (K, K), a row for each label and a column for each prediction, as a PNG picture; shades are shares of the row."""
    from matplotlib.figure import Figure

    count, legible = len(classes), len(classes) <= LEGIBLE
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 1.8 + 0.5 * count) if legible else 9.0
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="label")
    if legible:
        names = [shortened(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, str(number), ha="center", va="center", fontsize=7, color=colour)
    save(figure, path)


def plot_reliability(
    series: dict[str, Sequence[tuple[float, float, float]]],
    counts: Sequence[int],
    path: Path,
) -> None:
    """Accuracy over confidence, beside the diagonal of a calibrated network, as a PNG picture.

    Args:
        series: for each label of the legend, points of confidence, accuracy and share of the images.
        counts: images in each bin of the first series, of equal width over 0 to 1.
        path: the picture.
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
    save(figure, path)


def plot_mistakes(images: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Images uint8 (N, H, W, 3), N at least 1, each with its caption above it, as a PNG picture."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=7, parse_math=False)
    save(figure, path)


def shortened(name: str, letters: int = 14) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def save(figure: Figure, path: Path) -> None:
    """Raises FastcifarError where `path` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with writing(path):
        FigureCanvasAgg(figure).print_png(str(path))
