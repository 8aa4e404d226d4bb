"""What the person at the keyboard sees: a live line in a terminal, plain lines where the output is piped."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from fastcifar.runs.folder import Result
from fastcifar.runs.records import EpochRecord

REFRESH_SECONDS = 0.25


class Console:
    """Shows a run as it goes, on `rich`, by default the standard output."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        self.rich = rich or RichConsole(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.batch_size, self.first, self.started, self.shown = 0, 0, 0.0, 0.0
        self.last = ""
        self.epoch_seconds: list[float] = []

    def note(self, text: str, *, prominent: bool = False) -> None:
        """One line that stays."""
        self.rich.print(text, markup=False, style="bold reverse" if prominent else None)

    def begin(self, step: int, total_steps: int, batch_size: int) -> None:
        """Training starts, or goes on, after `step` steps."""
        self.batch_size, self.first, self.started = batch_size, step, time.perf_counter()
        if self.rich.is_terminal:
            left = TimeRemainingColumn(table_column=Column(no_wrap=True))  # in a narrow terminal only the bar gives way
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), left)
            self.progress = Progress(*columns, console=self.rich, transient=True, auto_refresh=False)
            self.progress.start()
            self.task = self.progress.add_task("training", total=total_steps, completed=step, rate="")

    def tick(self, step: int, epoch: int, epochs: int, lr: float) -> None:
        """A step has been launched; loss and accuracy stay those of the last epoch, since newer ones would wait for the device."""
        now = time.perf_counter()
        if self.progress and now - self.shown > REFRESH_SECONDS:
            self.shown = now
            rate = (step - self.first) * self.batch_size / (now - self.started)
            description = f"epoch {epoch}/{epochs}  {self.last}lr {lr:.4f}"
            self.progress.update(self.task, completed=step, description=description, rate=f"{rate:,.0f} img/s", refresh=True)

    def write(self, record: EpochRecord) -> None:
        """An epoch has ended."""
        self.epoch_seconds.append(time.perf_counter() - self.started - sum(self.epoch_seconds))
        self.last = f"loss {record.train_loss:.4f}  train {percent(record.train_accuracy)}  "
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
        fields = "  ".join(f"{name} {value}" for name, value in shown.items() if value)
        self.note(f"epoch {record.epoch:>{len(str(record.epochs))}}/{record.epochs}  {fields}")

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def summary(self, result: Result, folder: Path) -> None:
        """How the run ended."""
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
        }
        table = Table(show_header=False, box=None)
        for name, value in rows.items():
            if value:
                table.add_row(name, value)
        self.rich.print(table)

    def epoch_times(self) -> str:
        """How long the epochs of this session took; the first one, in which libraries still choose their algorithms, apart."""
        first, *others = self.epoch_seconds or [0.0]
        return f"first {first:.1f} s, then {sum(others) / len(others):.1f} s each" if others else ""


class Silence(Console):
    """Shows nothing."""

    def __init__(self) -> None:
        super().__init__(RichConsole(quiet=True))


def percent(fraction: float | None) -> str:
    """A fraction as a percentage; nothing for None."""
    return "" if fraction is None else f"{100 * fraction:.2f}%"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
