"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastcifar.runs.records import EpochRecord

SERIES = {
    "loss": {"train_loss": "train", "validation_loss": "validation"},
    "accuracy (%)": {
        "train_accuracy": "train (running)",
        "validation_accuracy": "validation",
        "averaged_validation_accuracy": "validation, averaged weights",
        "test_accuracy": "test",
        "averaged_test_accuracy": "test, averaged weights",
    },
    "learning rate": {"lr": "lr"},
}


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Loss, accuracies and learning rate over the epochs, as a PNG picture at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(SERIES)), SERIES.items(), strict=True):
        for name, label in series.items():
            points = [(record.epoch, getattr(record, name)) for record in records if getattr(record, name) is not None]
            if points:
                epochs, values = zip(*points, strict=True)
                scale = 100 if "accuracy" in name else 1
                axes.plot(epochs, [scale * value for value in values], label=label, marker="." if len(points) < 20 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
