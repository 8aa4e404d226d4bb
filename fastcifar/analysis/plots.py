"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastcifar.runs.records import EpochRecord, values

SERIES = {
    "loss": "loss/",
    "accuracy (%)": "accuracy/",
    "learning rate": "lr",
}
"""The beginning of the names that each picture shows (`runs.records.TAGS`)."""


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Loss, accuracies and learning rate over the epochs, as a PNG picture at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, prefix) in zip(figure.subplots(1, len(SERIES)), SERIES.items(), strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in values(record).items():
                if name.startswith(prefix):
                    points.setdefault(name.removeprefix(prefix), []).append((record.epoch, value * (100 if "accuracy" in name else 1)))
        for name, series in points.items():
            axes.plot(*zip(*series, strict=True), label=name.replace("/", ", ") or prefix, marker="." if len(series) < 20 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def plot_lr(lr: Sequence[float], steps_per_epoch: int, kinks: Sequence[int], path: Path) -> None:
    """The learning rate of each step over the epochs, its kinks marked, as a PNG picture at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([step / steps_per_epoch for step in range(len(lr))], lr)
    axes.plot([step / steps_per_epoch for step in kinks], [lr[step] for step in kinks], "o", markersize=4)
    axes.set(title="learning rate", xlabel="epoch", ylim=(0, 1.05 * max(lr)))
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def plot_split(split: Mapping[str, float], floors: Mapping[str, float], title: str, path: Path) -> None:
    """The seconds of a step by part as one stacked bar, its floors as lines across, as a PNG picture at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes, left = figure.subplots(), 0.0
    for number, (name, seconds) in enumerate(split.items()):
        colour = "lightgrey" if name == "idle" else f"C{number}"
        axes.barh(0, 1e3 * seconds, left=1e3 * left, color=colour, label=f"{name} {1e3 * seconds:.3g} ms")
        left += seconds
    for (name, seconds), style in zip(floors.items(), ("--", ":"), strict=False):
        axes.axvline(1e3 * seconds, color="black", linestyle=style, label=f"floor by {name} {1e3 * seconds:.3g} ms")
    axes.set(title=title, xlabel="ms", yticks=[])
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))
