"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastcifar.analysis.picture import shortened
from fastcifar.optim.schedules import lr_table
from fastcifar.runs.checkpoint import WEIGHTS
from fastcifar.runs.console import percent
from fastcifar.runs.folder import Result, Run
from fastcifar.runs.records import EpochRecord, read_records, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
"""Epochs, each with its value."""

FEW = 20
"""Epochs, or steps, up to which each has a marker."""
END_SHARE = 0.2
"""Share of the epochs of a longer run that are shown enlarged."""
WIDE_RANGE = 10.0
"""Ratio of the highest loss to the lowest from which their scale is logarithmic."""


def plot_run(run: Run) -> Figure:
    """The curves of a run with at least one epoch, as `plot_curves`. Raises FastcifarError where its folder is
    damaged.
    """
    config, records = run.config(), read_records(run.metrics)
    steps_per_epoch = records[-1].step // records[-1].epoch
    table = lr_table(config.schedule, config.optim.peak_lr(config.batch_size), steps_per_epoch, config.epochs)
    title = f"{run.path.resolve().name}: {config.model.arch}"
    return plot_curves(records, applied_lr(records, table), title, run.result())


def applied_lr(records: Sequence[EpochRecord], table: Sequence[float]) -> list[float]:
    """The learning rate of each recorded step: the table's, times a factor that gives each epoch's last step what was
    recorded of it.

    That factor is 1, unless a plateau lowered the rate, or the table is of a run that was made longer since.
    """
    applied: list[float] = []
    for record in records:
        last = table[record.step - 1]
        factor = record.lr / last if last else 1.0
        applied += [factor * lr for lr in table[len(applied) : record.step]]
    return applied


def plot_curves(records: Sequence[EpochRecord], lr: Sequence[float], title: str, result: Result | None) -> Figure:
    """Loss and accuracies of each epoch, the learning rate of each step, and the test accuracies that the run came to.

    Args:
        records: at least one.
        lr: of each step in these epochs.
        title: of the picture.
        result: of a run that has ended.
    """
    from matplotlib.figure import Figure

    losses, accuracies = series(records, "loss/"), series(records, "accuracy/", 100)
    names, last = list(accuracies), records[-1].epoch
    finals = {} if result is None else final_accuracies(result, last)
    first = round((1 - END_SHARE) * last)
    lower = "end" if last > FEW and len(names) > 1 else "accuracy"
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(shortened(title, 80), parse_math=False)
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
        late = {
            name: [point for point in points if point[0] >= first]
            for name, points in accuracies.items()
            if name != "train"
        }
        plot_lines(panels["end"], late, names)
        plot_finals(panels["end"], {label: point for label, point in finals.items() if point[0] >= first})
        panels["end"].set(title="the end, without training accuracy (%)", xlim=(first, last + 0.02 * (last - first)))
    panels["lr"].plot([last * step / len(lr) for step in range(len(lr))], lr, marker="." if len(lr) <= FEW else None)
    panels["lr"].set(title="learning rate", ylim=(0, 1.05 * max(lr)))
    figure.legend(
        *panels["accuracy"].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small"
    )
    return figure


def series(records: Sequence[EpochRecord], prefix: str, scale: float = 1) -> dict[str, Points]:
    """The values whose names (`runs.records.TAGS`) begin with `prefix`, by the rest of the name, times `scale`."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in values(record).items():
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append((record.epoch, scale * value))
    return found


def final_accuracies(result: Result, last: int) -> dict[str, tuple[int, float]]:
    """For each label of the legend, the epoch that the weights are from, and what they reach on the test set in %."""
    accuracies = {WEIGHTS: result.test_accuracy, **result.averaged_test_accuracies}
    epochs = {name: result.chosen_epochs.get(name, last) for name in accuracies}
    chosen = "best" if result.chosen_epochs else "last"
    return {
        f"final test, {name}: {percent(accuracy)} ({chosen} epoch {epochs[name]})": (epochs[name], 100 * accuracy)
        for name, accuracy in accuracies.items()
    }


def plot_lines(axes: Axes, lines: Mapping[str, Points], names: Sequence[str]) -> None:
    """Lines in the colours of `names`. Those of the weights are wide and pale, so that their averages, thin and
    dashed, show upon them.
    """
    for name, points in lines.items():
        number = names.index(name)
        style = {"linewidth": 3.5, "alpha": 0.45, "marker": "o", "markersize": 8}
        if "/" in name:
            style = {
                "linewidth": 1.2,
                "linestyle": ("-", "--", ":", "-.")[number % 4],
                "marker": "x+v^"[number % 4],
                "zorder": 3,
            }
        if len(points) > FEW:
            style["marker"] = None
        axes.plot(*zip(*points, strict=True), color=f"C{number}", label=name.replace("/", ", "), **style)


def plot_finals(axes: Axes, finals: Mapping[str, tuple[int, float]]) -> None:
    """A mark for each, hollow and smaller than those before it, so that none hides another."""
    for number, (label, point) in enumerate(finals.items()):
        style = {
            "markersize": 15 / (1 + number / 2),
            "markerfacecolor": "none",
            "color": "black",
            "zorder": 4,
            "linestyle": "none",
        }
        axes.plot(*point, marker="*os^Dvp"[number % 7], label=label, **style)


def plot_lr(lr: Sequence[float], steps_per_epoch: int, kinks: Sequence[int]) -> Figure:
    """The learning rate of each step over the epochs, its kinks marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([step / steps_per_epoch for step in range(len(lr))], lr, marker="." if len(lr) <= FEW else None)
    axes.plot([step / steps_per_epoch for step in kinks], [lr[step] for step in kinks], "o", markersize=4)
    axes.set(title="learning rate", xlabel="epoch", ylim=(0, 1.05 * max(lr)))
    axes.grid(alpha=0.3)
    return figure


def plot_split(split: Mapping[str, float], floors: Mapping[str, float], title: str) -> Figure:
    """The seconds of a step by part as one stacked bar, its floors as lines across."""
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
