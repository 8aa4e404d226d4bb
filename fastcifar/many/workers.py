"""Processes that train runs, each an ordinary run folder that equals one trained alone.

The parent tells each process its run over a pipe and holds the pipe open; a process that reads its end, because the
parent was stopped or killed, saves its state and stops. So no signal needs forwarding, and none trains on unseen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastcifar.config import RunConfig
from fastcifar.engine.run import resume, train
from fastcifar.errors import FastcifarError
from fastcifar.many.reproduce import Task
from fastcifar.runs.console import Console, percent
from fastcifar.runs.files import writing
from fastcifar.runs.folder import Run
from fastcifar.runs.interrupt import Interrupted, StopRequest
from fastcifar.runs.records import EpochRecord, read_records

COMMAND = (sys.executable, "-m", "fastcifar.many.workers")
POLL_SECONDS = 0.2
STDIN = 0


def has_ended(task: Task) -> bool:
    return (task.folder / "config.json").exists() and Run.open(task.folder).result() is not None


def log_of(folder: Path) -> Path:
    """Where the process that trains the run in `folder` writes what it says."""
    return folder.with_name(f"{folder.name}.log")


@dataclass
class Worker:
    """A process that trains a run."""

    task: Task
    process: subprocess.Popen
    first_step: int
    """Steps that had been done before."""
    seen: float = 0.0
    """When the records that are shown were written."""
    record: EpochRecord | None = None

    @staticmethod
    def start(task: Task) -> Worker:
        """Raises FastcifarError where the log cannot be written."""
        records = read_records(Run(task.folder).metrics)
        with writing(log := log_of(task.folder)):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "wb") as output:
                # In a group of its own the process does not get the terminal's Ctrl-C, which the parent answers for
                # all.
                group = (
                    {"process_group": 0}
                    if os.name == "posix"
                    else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
                )
                process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=output, stderr=output, **group)
        worker = Worker(task, process, records[-1].step if records else 0)
        with suppress(BrokenPipeError):  # it is gone already, and its last words say why
            process.stdin.write(
                json.dumps({"config": task.config.to_json(), "folder": str(task.folder)}).encode() + b"\n"
            )
            process.stdin.flush()
        return worker

    def stop(self) -> None:
        """Lets it save its state and end."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def look(self) -> bool:
        """Reads its last record, where there is a newer one; says whether there was."""
        try:
            written = os.stat(Run(self.task.folder).metrics).st_mtime
        except OSError:
            return False
        if written == self.seen:
            return False
        self.seen, self.record = written, next(reversed(read_records(Run(self.task.folder).metrics)), None)
        return self.record is not None

    @property
    def images(self) -> int:
        """Trained on so far."""
        return (self.record.step - self.first_step) * self.task.config.batch_size if self.record else 0

    @property
    def failure(self) -> str:
        """The last that it said."""
        lines = log_of(self.task.folder).read_text("utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        code = self.process.returncode
        return said.removeprefix("fastcifar: ") if code >= 0 else f"it was killed by signal {-code}"


class Board:
    """A line for each run under way, in a terminal; elsewhere one for each that ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
        self.progress = Progress(
            *columns, console=console.rich, transient=True, auto_refresh=False, disable=not console.rich.is_terminal
        )
        self.lines: dict[Path, TaskID] = {}

    def show(self, worker: Worker) -> None:
        folder, epochs, record = worker.task.folder, worker.task.config.epochs, worker.record
        if folder not in self.lines:
            self.lines[folder] = self.progress.add_task(folder.name, total=epochs, told="starting")
        if record:
            validated = (
                f"  validation {percent(record.validation_accuracy)}" if record.validation_accuracy is not None else ""
            )
            told = (
                f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.4f}{validated}  "
                f"{record.images_per_second:,.0f} img/s"
            )
            self.progress.update(self.lines[folder], completed=record.epoch, told=told)
        self.progress.refresh()

    def end(self, worker: Worker, text: str) -> None:
        self.progress.remove_task(self.lines.pop(worker.task.folder))
        self.console.note(f"{worker.task.folder}  {text}")


class Pool:
    """Runs tasks, `at_once` at a time."""

    def __init__(self, at_once: int, console: Console) -> None:
        self.at_once, self.board = at_once, Board(console)
        self.images = 0
        """Trained on by those that have ended."""
        self.running: list[Worker] = []

    def run(self, tasks: Sequence[Task]) -> dict[Path, str]:
        """Folder and last words of those that failed. Raises Interrupted after a signal, once all have saved their
        state.
        """
        waiting, failures = list(tasks), {}
        try:
            with StopRequest() as request, self.board.progress:
                while self.running or (waiting and request.signal_number is None):
                    if request.signal_number is not None:
                        self.stop()
                    while waiting and len(self.running) < self.at_once and request.signal_number is None:
                        self.running.append(Worker.start(waiting.pop(0)))
                        self.board.show(self.running[-1])
                    time.sleep(POLL_SECONDS)
                    failures |= self.reap(stopping=request.signal_number is not None)
                if request.signal_number is not None:
                    raise Interrupted(request.signal_number, tasks[0].folder)
        finally:
            for worker in self.running:
                worker.kill()
        return failures

    def stop(self) -> None:
        for worker in self.running:
            worker.stop()

    def reap(self, stopping: bool) -> dict[Path, str]:
        """Looks at every run, and lets go those that have ended; returns the failures among them."""
        failures = {}
        for worker in list(self.running):
            gone = worker.process.poll() is not None
            if worker.look():
                self.board.show(worker)
            if not gone:
                continue
            self.running.remove(worker)
            worker.stop()
            self.images += worker.images
            result = Run.open(worker.task.folder).result() if has_ended(worker.task) else None
            if result:
                self.board.end(worker, f"test {percent(result.test_accuracy)}, {result.images_per_second:,.0f} img/s")
            elif stopping:
                self.board.end(worker, "stopped")
            else:
                failures[worker.task.folder] = worker.failure
                self.board.end(worker, f"failed: {worker.failure}")
        return failures


def work() -> int:
    """The process: reads its run from the parent, then trains it or goes on with it; returns the exit status, as
    `fastcifar train`.
    """
    told = b""
    while not told.endswith(b"\n"):
        if not (part := os.read(STDIN, 1 << 16)):
            return 0
        told += part
    order = json.loads(told)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    folder = Path(order["folder"])
    try:
        if (folder / "config.json").exists():
            resume(folder, console=Console())
        else:
            train(RunConfig.from_json(order["config"]), folder, console=Console())
    except FastcifarError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    return 0


def stop_with_parent() -> None:
    """Waits for the end of the pipe, then asks the run to stop."""
    while os.read(STDIN, 1):
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(work())
