"""The folder of one run.

config.json        the complete configuration, choices resolved
metrics.jsonl      one record an epoch
events.*           the same for TensorBoard
curves.png         the same as a picture
.lock              held by the process that trains, and released when it dies
checkpoints/       the state to resume from, and the weights (see `runs.checkpoint`)
result.json        the result
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from filelock import FileLock, Timeout

from fastcifar.config import RunConfig
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.runs.files import exists, inside, partial_of, read_json, reading, write_text, writing

LOCK = ".lock"
LEFT_BY_A_KILL = {LOCK, partial_of(Path("config.json")).name}
"""What a run that was killed before its configuration was written may have left in its folder."""


@dataclass(frozen=True)
class Result:
    """A run's result; accuracies are fractions, times seconds, sizes bytes; None where a value does not apply."""

    test_accuracy: float
    """Accuracy of the best epoch's weights on the validation split; without one, of the last."""
    validation_accuracy: float | None
    """Accuracy of the same weights on the validation split."""
    averaged_test_accuracy: float | None
    """Test accuracy of the first average that the run keeps."""
    averaged_test_accuracies: dict[str, float]
    """Test accuracy of every average, by name."""
    chosen_epochs: dict[str, int]
    """The best epoch on the validation split, by name of the weights; empty without one."""
    watched_test_accuracy: float | None
    """The highest of the weights in any epoch, with `watch_test` only; the test set chose it, which flatters it."""
    images_per_second: float
    """Training images per second of training, with loading, but without compiling and evaluation."""
    seconds: float
    seconds_by_phase: dict[str, float]
    """Seconds of data (reading, waiting for batches), compile, train, evaluate; start-up and writing are left out."""
    flop_utilization: float | None
    """Training FLOPs a second over what the device's matrix product reaches in the same precision."""
    peak_memory_bytes: int | None
    parameters: int
    recipe: str | None
    device: str
    versions: dict[str, str]
    commit: str | None
    """Git commit of the code, where it runs from a checkout."""
    test_loss: float | None = None
    """Cross-entropy on the test set of the weights that `test_accuracy` is of."""
    validation_loss: float | None = None
    """The same on the validation split."""


@dataclass(frozen=True)
class Run:
    """A run's folder: its paths and their content."""

    path: Path

    @staticmethod
    def create(path: Path | None, config: RunConfig) -> Run:
        """Creates a run's folder, `./runs/NAME-TIME` by default.

        Raises ConfigError where it is not empty; FastcifarError, leaving nothing, where it cannot be written.
        """
        if path is None:
            # A configuration may be a stranger's, so its names lead nowhere else.
            name = re.sub(r"[^\w.:-]+", "-", config.recipe or config.model.arch, flags=re.ASCII).lstrip(".-")[:100]
            first = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            others = (first.with_name(f"{first.name}-{number}") for number in count(2))
            path = next(place for place in chain([first], others) if not os.path.exists(place))
        with writing(path):
            check_free(path)
            made = [place for place in (path, *path.parents) if not os.path.exists(place)]
            try:
                path.mkdir(parents=True, exist_ok=True)
                run = Run(path)
                with run.locked():
                    check_free(path)
                    run.write_config(config)
                return run
            except BaseException:
                with suppress(OSError):
                    (path / LOCK).unlink()
                for place in made:
                    with suppress(OSError):
                        place.rmdir()
                raise

    @staticmethod
    def open(path: Path) -> Run:
        """Opens an existing run's folder. Raises ConfigError where it is none."""
        if not exists(path / "config.json"):
            raise ConfigError(f"{path} is no run: it has no config.json; give the folder that `fastcifar train` named.")
        return Run(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against training by other processes. Raises FastcifarError where one has locked it."""
        lock = FileLock(inside(self.path, LOCK), blocking=False)
        with writing(self.path):
            try:
                lock.acquire()
            except Timeout:
                message = f"another process trains into {self.path}; wait for it or stop it, or choose another --out."
                raise FastcifarError(message) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Raises FastcifarError where it is a link."""
        return inside(self.path, "checkpoints")

    def config(self) -> RunConfig:
        """Reads the configuration. Raises FastcifarError where it is damaged or, as another version's, incomplete."""
        return read_json(self.path / "config.json", RunConfig, "mend it, or start the run again")

    def write_config(self, config: RunConfig) -> None:
        write_text(self.path / "config.json", config.to_json())

    def write_result(self, result: Result) -> None:
        write_text(self.path / "result.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")

    def check_there(self) -> None:
        """Raises FastcifarError where the folder was removed or renamed since the run began."""
        if not exists(self.path / "config.json"):
            raise FastcifarError(
                f"{self.path} was removed or renamed while it was trained; resume it where it is now, or train anew."
            )

    def sweep(self) -> None:
        """Removes what killed processes left half-written; to be called with the folder locked."""
        with writing(self.path):
            for name in ("config.json", "metrics.jsonl", "result.json", "curves.png"):
                partial_of(self.path / name).unlink(missing_ok=True)

    def set_aside_result(self, epochs: int) -> None:
        """Renames the result of a run of `epochs` epochs, since the run goes on."""
        file = self.path / "result.json"
        with writing(file):
            if exists(file):
                os.replace(file, file.with_name(f"result-{epochs}-epochs.json"))

    def result(self) -> Result | None:
        """Reads the result; None where the run has not ended. Raises FastcifarError where the file is damaged."""
        file = self.path / "result.json"
        if not exists(file):
            return None
        return read_json(file, Result, f"delete it, and let --resume {self.path} write it again")


def check_free(path: Path) -> None:
    """Raises ConfigError where `path` is taken; what a kill may have left of the first write does not take it."""
    with reading(path, "choose another --out"):
        free = not exists(path) or (path.is_dir() and {entry.name for entry in path.iterdir()} <= LEFT_BY_A_KILL)
    if not free:
        raise ConfigError(f"{path} exists already; choose another --out, or go on with it by --resume {path}.")
