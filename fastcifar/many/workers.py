"""Carries out several jobs at a time, each in a process of its own, so that a run equals one trained alone.

The process pool of `concurrent.futures` would not do: it gives up all jobs when one of its processes is killed, and
cannot ask a process to save its state and stop. Here the parent sends each process its job over a pipe, which it holds
open. A process that reads the end of the pipe, because the parent closed it or was killed, saves and stops.
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
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from fastcifar.checks import given
from fastcifar.config import RunConfig
from fastcifar.errors import FastcifarError
from fastcifar.many.jobs import Job, carry_out
from fastcifar.output import complain
from fastcifar.runs.console import Console, percent
from fastcifar.runs.files import writing
from fastcifar.runs.folder import Run
from fastcifar.runs.interrupt import Interrupted, StopRequest
from fastcifar.runs.records import EpochRecord, read_records

COMMAND = (sys.executable, "-P", "-m", "fastcifar.many.workers")
"""With -P, Python imports nothing from the current folder, which may be a stranger's."""
POLL_SECONDS = 0.2
STDIN = 0


def run_jobs(jobs: Sequence[Job], at_once: int, console: Console) -> tuple[dict[Path, str], int]:
    """Carries out `jobs`, `at_once` of them at a time, with a line for each that ends and, in a terminal, that runs.

    Returns the last words of those that failed, by folder, and the images that all trained on. Raises FastcifarError
    where a log cannot be written; Interrupted after a signal, once all have saved their state.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    hidden = not console.rich.is_terminal
    progress = Progress(*columns, console=console.rich, transient=True, auto_refresh=False, disable=hidden)
    waiting, failures, images = list(jobs), {}, 0
    running: list[Worker] = []
    try:
        with StopRequest() as request, progress:
            while running or (waiting and request.signal_number is None):
                while waiting and len(running) < at_once and request.signal_number is None:
                    running.append(Worker(waiting.pop(0), progress))
                time.sleep(POLL_SECONDS)
                stopping = request.signal_number is not None
                for worker in list(running):
                    ended = worker.process.poll() is not None
                    if ended or stopping:
                        worker.stop()
                    worker.show()
                    if ended:
                        running.remove(worker)
                        images += worker.images
                        console.note(f"{worker.job.folder}  {worker.ending(stopping)}")
                        if worker.job.result is None and not stopping:
                            failures[worker.job.folder] = worker.last_words
            if request.signal_number is not None:
                raise Interrupted(request.signal_number, jobs[0].folder)
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.wait()
    return failures, images


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


class Worker:
    """A process that carries out `job`, with its line of `progress`. Raises FastcifarError without a writable log."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.metrics = Run(job.folder).metrics
        self.metrics_time = 0.0
        self.record: EpochRecord | None = None
        before = read_records(self.metrics)
        self.first_step = before[-1].step if before else 0
        self.line = progress.add_task(job.folder.name, total=job.config.epochs, told="starting")
        with writing(log := log_of(job.folder)):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)  # a link would lead elsewhere
            with open(log, "xb") as output:
                # In a group of its own the process does not get the terminal's Ctrl-C, which the parent answers.
                self.process = subprocess.Popen(
                    COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    process_group=0,
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        self.pipe = given(self.process.stdin)
        order = {"config": job.config.to_json(), "folder": str(job.folder)}
        with suppress(BrokenPipeError):  # the process has ended, and its log says why
            self.pipe.write(json.dumps(order).encode() + b"\n")
            self.pipe.flush()

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.pipe.close()

    def show(self) -> None:
        with suppress(FileNotFoundError):
            written = self.metrics.stat().st_mtime
            if written != self.metrics_time:
                self.metrics_time, records = written, read_records(self.metrics)
                self.record = records[-1] if records else None
        if record := self.record:
            validated = record.validation_accuracy
            told = [f"epoch {record.epoch}/{record.epochs}", f"loss {record.train_loss:.4f}"]
            told += [] if validated is None else [f"validation {percent(validated)}"]
            told += [f"{record.images_per_second:,.0f} img/s"]
            self.progress.update(self.line, completed=record.epoch, told="  ".join(told))
        self.progress.refresh()

    def ending(self, stopped: bool) -> str:
        """Removes the line of the process, which has ended; returns its outcome."""
        self.progress.remove_task(self.line)
        if result := self.job.result:
            return f"test {percent(result.test_accuracy)}, {result.images_per_second:,.0f} img/s"
        return "stopped" if stopped else f"failed: {self.last_words}"

    @property
    def images(self) -> int:
        return (self.record.step - self.first_step) * self.job.config.batch_size if self.record else 0

    @property
    def last_words(self) -> str:
        """The last line that the failed process wrote, or the signal that killed it."""
        if self.process.returncode < 0:
            return f"it was killed by signal {-self.process.returncode}"
        lines = log_of(self.job.folder).read_text("utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()] or ["it said nothing"]
        return said[-1].removeprefix("fastcifar: ")


def work() -> int:
    """Runs the job read from stdin; returns the exit status of `fastcifar train`."""
    order = b""
    while not order.endswith(b"\n"):
        if not (part := os.read(STDIN, 1 << 16)):
            return 0
        order += part
    told = json.loads(order)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        carry_out(RunConfig.from_json(told["config"]), Path(told["folder"]), Console())
    except FastcifarError as error:
        complain(f"fastcifar: {error}")
        return 2
    except Interrupted as stop:
        complain(stop)
        return 128 + stop.signal_number
    return 0


def stop_with_parent() -> None:
    """Waits for the end of the pipe, then asks the run to stop."""
    while os.read(STDIN, 1):
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(work())
