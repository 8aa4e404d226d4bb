"""Pictures of runs, evaluations, augmentations and profiles, as PNG files written atomically."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from fastcifar.errors import FastcifarError, reason
from fastcifar.optim.schedules import lr_table
from fastcifar.output import printable
from fastcifar.runs.console import percent
from fastcifar.runs.files import write_bytes, writing
from fastcifar.runs.folder import Result, Run
from fastcifar.runs.records import EpochRecord, read_records, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
"""(epoch, value) pairs."""

FEW = 20
"""Up to so many epochs, steps or classes, each has a marker or a number."""
END_SHARE = 0.2
"""The last part of a longer run, as a share of its epochs, which is shown enlarged."""
WIDE_RANGE = 10.0
"""The scale of the loss is logarithmic from this ratio of the highest to the lowest."""
LARGEST, SMALLEST_FONT = 20.0, 5.0
"""The longest side of a confusion matrix in inches, and the smallest font of its class names in points."""
COLUMNS, SIDE, SMALL_SIDE = 6, 2.4, 0.8
"""Images in a row, and inches across one, alone or beside labels."""
MOST_PIXELS = 65_000
"""The longest side of a PNG; matplotlib's limit is just below 65,536."""
LINE = 0.15
"""Inches between two lines of a caption."""


def draw(path: Path, plot: Callable[..., Figure], *given: Any) -> str | None:
    """Calls `save`; on failure returns a line for the user instead of raising."""
    try:
        save(path, plot, *given)
    except FastcifarError as error:
        return f"{path.name} was not drawn ({reason(error.__cause__ or error)})."
    return None


def save(path: Path, plot: Callable[..., Figure], *given: Any) -> None:
    """Writes the figure `plot(*given)` as a PNG file, making its folder.

    Raises:
        FastcifarError: it cannot be drawn or written; a file that was there is as it was.
    """
    content = io.BytesIO()
    try:
        import_matplotlib()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box
            plot(*given).savefig(content, format="png")
    except Exception as error:
        raise FastcifarError(
            f"{path} cannot be drawn ({reason(error)}); see whether matplotlib is installed as it should be."
        ) from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())


def import_matplotlib() -> None:
    """Imports matplotlib even where MPLBACKEND names a missing backend, as in notebooks.

    Only pyplot needs a backend; if it is imported later it uses the one of the variable, where that exists.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", "")
    import matplotlib

    if backend:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def shortened(name: str, cells: int) -> str:
    """Puts a name on one line, cut to the width of `cells` Latin letters."""
    text = Text(printable(" ".join(name.split())))
    text.truncate(cells, overflow="ellipsis")
    return text.plain


def plot_run(run: Run) -> Figure:
    """Plots the curves of a run with at least one epoch. Raises FastcifarError where its folder is damaged."""
    config, records = run.config(), read_records(run.metrics)
    steps_per_epoch = records[-1].step // records[-1].epoch
    table = lr_table(config.schedule, config.optim.peak_lr(config.batch_size), steps_per_epoch, config.epochs)
    title = f"{run.path.resolve().name}: {config.model.arch}"
    return plot_curves(records, applied_lr(records, table), title, run.result())


def applied_lr(records: Sequence[EpochRecord], table: Sequence[float]) -> list[float]:
    """The learning rate of each recorded step: the table, scaled to the last recorded rate of each epoch.

    The two differ where a plateau lowered the rate, or where the run has been made longer since.
    """
    applied: list[float] = []
    for record in records:
        last = table[record.step - 1]
        factor = record.lr / last if last else 1.0
        applied += [factor * lr for lr in table[len(applied) : record.step]]
    return applied


def plot_curves(records: Sequence[EpochRecord], lr: Sequence[float], title: str, result: Result | None) -> Figure:
    """Plots loss and accuracies by epoch, the learning rate by step, and the final test accuracies.

    There is at least one of `records`, and `lr` has a value for each step of these epochs. `result` is None while the
    run has not ended.
    """
    from matplotlib.figure import Figure

    losses, accuracies = series(records, "loss/"), series(records, "accuracy/", 100)
    names, last = list(accuracies), records[-1].epoch
    finals = {} if result is None else final_accuracies(result, last)
    late = round((1 - END_SHARE) * last)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(shortened(title, 80), parse_math=False)
    lower = "end" if last > FEW and len(names) > 1 else "accuracy"
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["lr", lower]], width_ratios=(2, 3))
    for axes in panels.values():
        axes.set(xlabel="epoch", xlim=(0, 1.02 * records[-1].epochs))
        axes.grid(alpha=0.3)
    plot_lines(panels["loss"], losses, names)
    every = [value for points in losses.values() for _, value in points]
    panels["loss"].set(title="loss", yscale="log" if max(every) > WIDE_RANGE * min(every) > 0 else "linear")
    plot_lines(panels["accuracy"], accuracies, names)
    plot_finals(panels["accuracy"], finals)
    panels["accuracy"].set(title="accuracy (%)")
    if "end" in panels:
        shown = {name: [point for point in points if point[0] >= late] for name, points in accuracies.items()}
        del shown["train"]
        plot_lines(panels["end"], shown, names)
        plot_finals(panels["end"], {label: point for label, point in finals.items() if point[0] >= late})
        panels["end"].set(title="the end, without training accuracy (%)", xlim=(late, last + 0.02 * (last - late)))
    plot_rates(panels["lr"], [last * step / len(lr) for step in range(len(lr))], lr)
    entries = panels["accuracy"].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def series(records: Sequence[EpochRecord], prefix: str, scale: float = 1) -> dict[str, Points]:
    """The values whose names in `runs.records.TAGS` begin with `prefix`, times `scale`, by the rest of the name."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in values(record).items():
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append((record.epoch, scale * value))
    return found


def final_accuracies(result: Result, last: int) -> dict[str, tuple[int, float]]:
    """For each label, the epoch of the weights and their test accuracy in %."""
    from fastcifar.runs.checkpoint import WEIGHTS  # which imports torch

    accuracies = {WEIGHTS: result.test_accuracy, **result.averaged_test_accuracies}
    epochs = {name: result.chosen_epochs.get(name, last) for name in accuracies}
    chosen = "best" if result.chosen_epochs else "last"
    return {
        f"final test, {name}: {percent(accuracy)} ({chosen} epoch {epochs[name]})": (epochs[name], 100 * accuracy)
        for name, accuracy in accuracies.items()
    }


def plot_lines(axes: Axes, lines: Mapping[str, Points], names: Sequence[str]) -> None:
    """Draws lines in the colours of `names`; those of raw weights are wide and pale, so that averages stay visible."""
    for name, points in lines.items():
        number = names.index(name)
        if "/" in name:
            style = {"linewidth": 1.2, "linestyle": ("-", "--", ":", "-.")[number % 4], "zorder": 3}
            style |= {"marker": "x+v^"[number % 4]}
        else:
            style = {"linewidth": 3.5, "alpha": 0.45, "marker": "o", "markersize": 8}
        if len(points) > FEW:
            style["marker"] = None
        axes.plot(*zip(*points, strict=True), color=f"C{number}", label=name.replace("/", ", "), **style)


def plot_finals(axes: Axes, finals: Mapping[str, tuple[int, float]]) -> None:
    """Draws hollow marks, each smaller than the one before, so that none hides another."""
    style = {"markerfacecolor": "none", "color": "black", "zorder": 4, "linestyle": "none"}
    for number, (label, point) in enumerate(finals.items()):
        axes.plot(*point, marker="*os^Dvp"[number % 7], markersize=15 / (1 + number / 2), label=label, **style)


def plot_rates(axes: Axes, epochs: Sequence[float], lr: Sequence[float]) -> None:
    axes.plot(epochs, lr, marker="." if len(lr) <= FEW else None)
    axes.set(title="learning rate", xlabel="epoch", ylim=(0, 1.05 * max(lr)))
    axes.grid(alpha=0.3)


def plot_lr(lr: Sequence[float], steps_per_epoch: int, kinks: Sequence[int]) -> Figure:
    """Plots the learning rate of each step over the epochs, and marks its kinks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    plot_rates(axes, [step / steps_per_epoch for step in range(len(lr))], lr)
    axes.plot([step / steps_per_epoch for step in kinks], [lr[step] for step in kinks], "o", markersize=4)
    return figure


def plot_split(split: Mapping[str, float], floors: Mapping[str, float], title: str) -> Figure:
    """Plots the seconds of a step by part as a stacked bar, with `floors` as lines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes, left = figure.subplots(), 0.0
    for number, (name, seconds) in enumerate(split.items()):
        colour = "lightgrey" if name == "idle" else f"C{number}"
        axes.barh(0, 1e3 * seconds, left=1e3 * left, color=colour, label=f"{name} {1e3 * seconds:.3g} ms")
        left += seconds
    for (name, seconds), style in zip(floors.items(), ("--", ":"), strict=False):
        axes.axvline(1e3 * seconds, color="black", linestyle=style, label=f"floor by {name} {1e3 * seconds:.3g} ms")
    axes.set(xlabel="ms", yticks=[])
    axes.set_title(shortened(title, 80), parse_math=False)
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    return figure


def plot_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plots counts int (K, K), rows by label and columns by prediction, beside the most frequent mistakes.

    Shades are shares of the label's images. The diagonal is grey, so that the mistakes stand out.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    count, few = len(classes), len(classes) <= FEW
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    wrong = np.ma.masked_array(share, np.eye(count, dtype=bool))
    side = min(max(0.5 * count, 2.0) if few else 0.13 * count, LARGEST)
    figure = Figure(figsize=(side + 6.5, side + 2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    norm = PowerNorm(0.5, 0, max(wrong.max(), 0.01))
    shades = axes.imshow(wrong, cmap="Reds", norm=norm)
    axes.set(xlabel="prediction", ylabel="label")
    font = min(0.75 * 72 * side / count, 9)
    if font >= SMALLEST_FONT:
        names = [shortened(name, 14) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, fontsize=font, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=font, parse_math=False)
    if few:
        for row, column in np.argwhere(confusion):
            dark = row != column and norm(float(share[row, column])) > 0.6
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
            axes.text(column, row, str(confusion[row, column]), **style)
    else:
        scale = {"format": PercentFormatter(1), "label": "share of the label's images"}
        figure.colorbar(shades, location="bottom", shrink=0.5, pad=0.01, **scale)
    worst = "\n".join(worst_pairs(confusion, classes, 5 if few else 12))
    axes.text(1.02, 1, worst, transform=axes.transAxes, va="top", linespacing=1.5, parse_math=False)
    return figure


def worst_pairs(confusion: np.ndarray, classes: Sequence[str], count: int) -> list[str]:
    """A heading, then a line for each of the `count` most frequent pairs of label and prediction."""
    wrong = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    worst: list[int] = np.argsort(-wrong, axis=None, kind="stable")[:count].tolist()
    lines = [
        f"{shortened(classes[label], 16)} → {shortened(classes[given], 16)}: {wrong[label, given]:,}"
        for label, given in (divmod(place, len(classes)) for place in worst)
        if wrong[label, given]
    ]
    return ["label → prediction: images", *lines] if lines else []


def plot_reliability(series: dict[str, Sequence[tuple[float, float, float]]], counts: Sequence[int]) -> Figure:
    """Plots accuracy over confidence, beside the diagonal of a calibrated network.

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


def plot_landscape(losses: Mapping[str, np.ndarray], places: Sequence[float]) -> Figure:
    """Plots loss surfaces side by side, each float64 (P, P) over `places` along two directions, and their contours.

    All have the same heights and colours, by the logarithm of the loss; what is not finite is left out.
    """
    from matplotlib.figure import Figure

    heights = {name: np.log10(np.where(np.isfinite(z), z, np.nan).clip(1e-6)) for name, z in losses.items()}
    every = np.stack(list(heights.values()))
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    shades = {"cmap": "viridis", "vmin": low, "vmax": high}
    ends = (places[0], 0, places[-1])
    figure = Figure(figsize=(5 * len(heights), 9), layout="constrained")
    x, y = np.meshgrid(places, places, indexing="ij")
    for number, (name, height) in enumerate(heights.items(), 1):
        surface = figure.add_subplot(2, len(heights), number, projection="3d")
        surface.plot_surface(x, y, height, **shades)
        surface.set(zlim=(low, high), zlabel="log10 of the loss", xticks=ends, yticks=ends)
        surface.set_title(shortened(name[-48:], 48), parse_math=False)
        contours = figure.add_subplot(2, len(heights), len(heights) + number, aspect="equal")
        lines = contours.contour(x, y, height, levels=np.linspace(low, high, 16), **shades)
        contours.clabel(lines, fmt=lambda level: f"{10**level:.2g}", fontsize=7)
        contours.set(xlabel="first direction", ylabel="second direction")
    return figure


def plot_images(images: np.ndarray, captions: Sequence[str], title: str = "", labels: Sequence[str] = ()) -> Figure:
    """Plots images with captions above them as one mosaic.

    Args:
        images: uint8 (R, N, H, W, 3): R versions of each of N images, which stand one below the other.
        captions: N texts of a few lines.
        title: of the picture.
        labels: of the versions, beside them; all images then stand in one row, smaller.
    """
    from matplotlib.figure import Figure

    versions, count, height, width, _ = images.shape
    columns, side = (count, SMALL_SIDE) if labels else (min(COLUMNS, count), SIDE)
    gap = max(width // 32, 1)
    inch = (width + gap) / side
    head = math.ceil((max(caption.count("\n") for caption in captions) + 1.5) * LINE * inch)
    mosaic = tiled(images, columns, head, gap)
    heading = 2 * LINE * (title.count("\n") + 1) if title else 0
    size = (columns * side + bool(labels) * 3, mosaic.shape[0] / inch + heading)
    figure = Figure(figsize=size, dpi=min(100, MOST_PIXELS / max(size)), layout="constrained")
    axes = figure.subplots()
    axes.set_frame_on(False)
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    centres = [head + (row + 0.5) * (height + gap) for row in range(len(labels))]
    axes.set_yticks(centres, labels, fontsize=8, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for number, caption in enumerate(captions):
        row, column = divmod(number, columns)
        place = column * (width + gap) - 0.5, row * (head + versions * (height + gap)) + head - 0.5
        style = {"fontsize": 8, "parse_math": False, "in_layout": False}
        axes.annotate(caption, place, (0, 2), textcoords="offset points", **style)
    return figure


def tiled(images: np.ndarray, columns: int, head: int, gap: int) -> np.ndarray:
    """One picture of R versions of N images, uint8 (R, N, H, W, 3), versions stacked, `columns` images in a row.

    `head` pixels above each image, and `gap` pixels below and right of each version, are white.
    """
    versions, count, height, width, _ = images.shape
    rows, tall, wide = -(-count // columns), head + versions * (height + gap), width + gap
    tiles = np.full((rows * columns, tall, wide, 3), 255, np.uint8)
    stacks = tiles[:count, head:].reshape(count, versions, height + gap, wide, 3)
    stacks[:, :, :height, :width] = images.swapaxes(0, 1)
    tiles[:count, head:] = stacks.reshape(count, tall - head, wide, 3)
    return tiles.reshape(rows, columns, tall, wide, 3).swapaxes(1, 2).reshape(rows * tall, columns * wide, 3)
