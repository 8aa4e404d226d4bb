"""Shows progress: a live line in a terminal or a notebook, plain lines in a pipe."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column

from fastcifar.output import LastingOutput, printable
from fastcifar.runs.folder import Result
from fastcifar.runs.records import EpochRecord

REFRESH_SECONDS = 0.25
NO_BREAK = "\u00a0"
"""Replaces a space at which a line must not be broken."""


class Console:
    """Shows a run's progress on `rich`, by default on standard output; the run goes on where that is closed or full.

    A terminal, which breaks lines between words, has a moving bar; so has a notebook with ipywidgets.
    """

    def __init__(self, rich: RichConsole | None = None) -> None:
        output: Any = LastingOutput(sys.stdout)
        self.rich = rich or RichConsole(file=output, highlight=False, soft_wrap=True)
        self.live = self.rich.is_terminal or (self.rich.is_jupyter and find_spec("ipywidgets") is not None)
        self.progress: Progress | None = None
        self.status: Status | None = None
        self.batch_size, self.first, self.started, self.shown = 0, 0, 0.0, 0.0
        self.epoch_seconds: list[float] = []

    def note(self, text: str, *, prominent: bool = False) -> None:
        self.stop_waiting()
        lines = text.split("\n")
        if self.rich.is_terminal:
            # Paths and commands stay whole, so that they can be copied.
            width = self.rich.width
            wrapper = TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            lines = [part for line in lines for part in wrapper.wrap(line) or [""]]
        text = "\n".join(printable(line.replace(NO_BREAK, " ")) for line in lines)
        self.rich.print(text, markup=False, style="bold reverse" if prominent else None)

    def wait(self, text: str) -> None:
        """Shows that something takes a while, until the next line."""
        if self.live:
            self.status = self.rich.status(text)
            self.status.start()
        else:
            self.note(text)

    def stop_waiting(self) -> None:
        if self.status:
            self.status.stop()
            self.status = None

    def begin(self, step: int, total_steps: int, batch_size: int) -> None:
        """Starts the bar as training starts, or resumes, after `step` steps."""
        self.batch_size, self.first, self.started = batch_size, step, time.perf_counter()
        if self.live:
            # In a narrow terminal only the bar gives way.
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),
                TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
            )
            self.progress = Progress(*columns, console=self.rich, transient=True, auto_refresh=False, expand=True)
            self.progress.start()
            self.task = self.progress.add_task("training", total=total_steps, completed=step, rate="")

    def tick(self, step: int, epoch: int, epochs: int, lr: float, loss: float | None, accuracy: float | None) -> None:
        """Updates the bar after a step was launched; `loss` and `accuracy` are those of this epoch, where known."""
        now = time.perf_counter()
        if self.progress and now - self.shown > REFRESH_SECONDS:
            self.shown = now
            rate = f"{(step - self.first) * self.batch_size / (now - self.started):,.0f} img/s"
            running = {"loss": "" if loss is None else f"{loss:.4f}", "train": percent(accuracy), "lr": f"{lr:.4f}"}
            description = joined(f"epoch {epoch}/{epochs}", running).replace(NO_BREAK, " ")
            self.progress.update(self.task, completed=step, description=description, rate=rate, refresh=True)

    def write(self, record: EpochRecord) -> None:
        self.epoch_seconds.append(time.perf_counter() - self.started - sum(self.epoch_seconds))
        per_step = (time.perf_counter() - self.started) / (record.step - self.first)
        left = per_step * record.step / record.epoch * (record.epochs - record.epoch)
        shown = {
            "loss": f"{record.train_loss:.4f}",
            "train": percent(record.train_accuracy),
            "validation": percent(record.validation_accuracy),
            **{name: percent(accuracy) for name, accuracy in record.averaged_validation_accuracies.items()},
            "test": percent(record.test_accuracy),
            **{f"test {name}": percent(accuracy) for name, accuracy in record.averaged_test_accuracies.items()},
            "lr": f"{record.lr:.4f}",
            "img/s": f"{record.images_per_second:,.0f}",
            "left": clock(left),
        }
        self.note(joined(f"epoch {record.epoch:>{len(str(record.epochs))}}/{record.epochs}", shown))

    def close(self) -> None:
        self.stop_waiting()
        if self.progress:
            self.progress.stop()
            self.progress = None

    def summary(self, result: Result, folder: Path) -> None:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds_by_phase.items())
        rows = {
            "test accuracy": percent(result.test_accuracy),
            **{f"  {name}": percent(accuracy) for name, accuracy in result.averaged_test_accuracies.items()},
            "  chosen on the test set": percent(result.watched_test_accuracy),
            "validation accuracy": percent(result.validation_accuracy),
            "chosen epochs": ", ".join(f"{name} {epoch}" for name, epoch in result.chosen_epochs.items()),
            "seconds": f"{result.seconds:.1f} ({phases})",
            "epochs": self.epoch_times(),
            "throughput": f"{result.images_per_second:,.0f} img/s",
            "peak memory": f"{result.peak_memory_bytes / 2**30:.2f} GiB" if result.peak_memory_bytes else "",
            "folder": str(folder),
            "next": f"fastcifar eval {shlex.quote(str(folder))}",
        }
        width = max(len(name) for name, value in rows.items() if value)
        for name, value in rows.items():
            if value:
                self.note(f"{name:{width}}  {value}")

    def epoch_times(self) -> str:
        """Describes how long this session's epochs took; in the first one, libraries still choose their algorithms."""
        first, *others = self.epoch_seconds or [0.0]
        return f"first {first:.1f} s, then {sum(others) / len(others):.1f} s each" if others else ""


class Silence(Console):
    def __init__(self) -> None:
        super().__init__(RichConsole(quiet=True))


def notebook_console() -> Console:
    """Returns a console that shows progress in a notebook and nothing elsewhere."""
    return Console() if RichConsole().is_jupyter else Silence()


def joined(first: str, fields: Mapping[str, str]) -> str:
    """Joins the non-empty fields into one line, in which a number stays with its name."""
    parts = [first, *(f"{name} {value}" for name, value in fields.items() if value)]
    return "  ".join(part.replace(" ", NO_BREAK) for part in parts)


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}%"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
