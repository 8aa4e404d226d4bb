"""Runs the command line in forks of one process, which has imported everything once, and judges how they end."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.backends import backend_agg  # noqa: F401
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

from fastcifar import cli
from fastcifar.checks import given
from fastcifar.engine import run as engine
from fastcifar.errors import FastcifarError
from fastcifar.inference import evaluate, export, predict  # noqa: F401
from fastcifar.output import complain
from fastcifar.runs.checkpoint import latest

FLAGS = (
    "--arch resnet --blocks 1 --channels 4 --batch-size 20 --epochs 2 --val-split 4 --device cpu --precision fp32 "
    "--compile off --threads 1 --loader torch --seed 3"
).split()


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    status: int
    """Its exit status, or minus the number of the signal that killed it."""
    output: str
    """What it wrote to standard output and standard error."""

    @property
    def fault(self) -> str | None:
        """What is wrong with this end; None where it succeeded, or refused in one sentence."""
        said = [text for text in self.output.splitlines() if text.startswith("fastcifar: ")]
        sentence = len(said) == 1 and said[0].isprintable() and said[0].endswith((".", "?")) and len(said[0]) < 1500
        stopped = self.status == cli.EXIT_SIGNALLED + signal.SIGINT and "go on with: fastcifar" in self.output
        if "Traceback" in self.output or not (stopped or self.status in (0, 1, cli.EXIT_BAD_INPUT)):
            return f"ends with {self.status}: {' / '.join(self.output.strip().splitlines()[-3:])}"
        if self.status == cli.EXIT_BAD_INPUT and not sentence:
            return f"ends in no sentence: {self.output[-500:]!r}"
        return None


def in_child(action: Callable[[], object], seconds: float = 30.0, memory: int = 4 * 2**30) -> Ended:
    """Runs `action` in a fork of this process, whose status it returns.

    The child is killed after so many `seconds`, and may take so many bytes of address space more than it has.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, -1))
                status = action() or 0
            except FastcifarError as error:
                complain(f"fastcifar: {error}")
                status = cli.EXIT_BAD_INPUT
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        _, code = os.waitpid(child, 0)
        output.seek(0)
        return Ended(os.waitstatus_to_exitcode(code), output.read().decode(errors="replace"))


def fastcifar(*arguments: object) -> Callable[[], int]:
    """The command line with these arguments, as an action for a child."""

    def act() -> int:
        engine.CHECKPOINT_SHARE = float("inf")  # every epoch is saved, however short
        engine.plot_run = lambda run: Figure((1, 1))  # curves take longer to draw than the run takes
        return cli.main([str(argument) for argument in arguments])

    return act


def make_data(folder: Path) -> Path:
    """Makes a data set of 64 images of 8x8 pixels to train on, and 20 to test on."""
    random = np.random.default_rng(0)
    arrays = {"classes": np.array(["ant", "bee"])}
    for split, count in (("train", 64), ("test", 20)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 2
    np.savez(folder / "data.npz", **arrays)
    np.save(folder / "images.npy", arrays["test_images"])
    return folder / "data.npz"


def weight_files(run: Path) -> dict[str, bytes]:
    folder = given(latest(run / "checkpoints"))
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


Trial = Callable[[Path], str | None]
"""An attack within an empty folder; returns what went wrong, or None where nothing did."""


@dataclass(frozen=True)
class Attack:
    """A row of the table of what was tried."""

    name: str
    prepare: Callable[[Path], dict[str, Trial]]
    """Returns the trials by name. Its folder, which other attacks share, is kept until all have ended."""
    short: int
    """How many of them belong to the fast tests."""
    middle: int
    """How many belong to `pytest -m faults`."""
    kept: tuple[str, ...] = ()
    """Names of trials that once went wrong, which every form has."""

    def run(self, place: Path, most: int | None = None) -> Iterator[tuple[str, str | None]]:
        """Carries out at most so many trials, evenly chosen; yields the name of each, and what went wrong."""
        trials = self.prepare(place)
        names, count = list(trials), min(most or len(trials), len(trials))
        for name in dict.fromkeys((*self.kept, *(names[number * len(names) // count] for number in range(count)))):
            with tempfile.TemporaryDirectory() as folder:
                yield name, trials[name](Path(folder))


@dataclass(frozen=True)
class Undisturbed:
    """A run of two epochs to compare with, and what its process was seen to do."""

    run: Path
    arguments: list[str]
    """Those that it was trained with, but for its folder."""
    weights: dict[str, bytes]
    seconds: float
    """How long it took."""

    @staticmethod
    @cache
    def make(place: Path) -> Undisturbed:
        data, run, began = make_data(place), place / "run", time.monotonic()
        arguments = ["train", "--dataset", str(data), *FLAGS, "--out"]
        ended = in_child(fastcifar(*arguments, run))
        assert ended.status == 0, ended.output
        return Undisturbed(run, arguments, weight_files(run), time.monotonic() - began)

    def command(self, run: Path, resumes: bool = False) -> Callable[[], int]:
        """What trains the same into `run`, or goes on with it."""
        return fastcifar("train", "--resume", run) if resumes else fastcifar(*self.arguments, run)

    def go_on(self, run: Path, *, without_points: bool = False) -> str | None:
        """Has the run in the folder go on to its end; returns what is wrong with the outcome.

        TensorBoard's points may be lacking `without_points`, as where its file could not be written.
        """
        ended = in_child(self.command(run, resumes=True))
        if ended.status == cli.EXIT_BAD_INPUT:
            ended = in_child(self.command(run))
        if ended.fault or ended.status:
            return ended.fault or f"does not go on: {ended.output}"
        epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        folders = [path.name for path in run.glob("checkpoints/*") if path.is_dir()]
        left = [path.name for path in run.rglob("*.partial")] + folders[1:]
        faults = {
            "ends in other weights": weight_files(run) != self.weights,
            f"has records of the epochs {epochs}": epochs != [1, 2],
            "has other points in TensorBoard": not without_points and points_of(run) != [1, 2],
            f"leaves {left}": left,
        }
        return next((fault for fault, found in faults.items() if found), None)


def points_of(run: Path) -> list[int]:
    """The steps of the training loss, as TensorBoard shows them."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # purging points is what it should do
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step for event in events.Scalars("loss/train")]
