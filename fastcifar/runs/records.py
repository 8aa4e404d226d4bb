"""The record of each epoch, and the files it is written to."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastcifar.errors import reason
from fastcifar.runs.files import check_regular, reading, write_text, writing
from fastcifar.serialization import build


@dataclass(frozen=True)
class EpochRecord:
    """One line of metrics.jsonl; accuracies are fractions, times seconds; None where a value does not apply."""

    epoch: int
    """Counted from 1."""
    epochs: int
    step: int
    """Steps done."""
    lr: float
    """The rate of the last step."""
    train_loss: float
    train_accuracy: float
    """Running accuracy on augmented images, with the weights of each step."""
    validation_loss: float | None
    validation_accuracy: float | None
    averaged_validation_accuracies: dict[str, float]
    """Accuracies of the averages, by name."""
    test_accuracy: float | None
    """Only with `watch_test`."""
    averaged_test_accuracies: dict[str, float]
    images_per_second: float
    seconds: float
    """Seconds since the run began, including compiling and interrupted sessions."""
    test_loss: float | None = None
    """Only with `watch_test`."""


class Sink(Protocol):
    def write(self, record: EpochRecord) -> None: ...

    def close(self) -> None: ...


def read_records(path: Path) -> list[EpochRecord]:
    """Reads a metrics.jsonl without a half-written last line. Raises FastcifarError where it is damaged."""
    with reading(path, "delete it"):
        try:
            check_regular(path)
            lines = path.read_text("utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
    records = []
    for number, text in enumerate(lines, start=1):
        with reading(f"{path}, line {number},", "delete the line"):
            records.append(build(EpochRecord, json.loads(text), "record", complete=True))
    return records


class JsonLines:
    """Appends to metrics.jsonl, after cutting it back to the checkpoint's epochs. Raises FastcifarError on failure."""

    def __init__(self, path: Path, epochs_done: int) -> None:
        self.path = path
        self.kept = [record for record in read_records(path) if record.epoch <= epochs_done]
        write_text(path, "".join(map(line, self.kept)))
        with writing(path):
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: EpochRecord) -> None:
        with writing(self.path):
            self.file.write(line(record))
            self.file.flush()

    def close(self) -> None:
        with writing(self.path):
            self.file.close()


def line(record: EpochRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"


TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "averaged_validation_accuracies": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "averaged_test_accuracies": "accuracy/test",
    "lr": "lr",
    "images_per_second": "img_per_s",
}
"""TensorBoard's tag for each field of a record; an average's name is appended."""


def values(record: EpochRecord) -> dict[str, float]:
    found = {}
    for field, tag in TAGS.items():
        value = getattr(record, field)
        found |= {f"{tag}/{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {tag: value}
    return {tag: value for tag, value in found.items() if value is not None}


EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]+)")


class TensorBoard:
    """Writes records for TensorBoard; where that fails, `note` is told once, and the run goes on.

    Each session begins a file of a higher number than there is, with all `records` that are kept; its first event voids
    the files before. So no point is there twice, or missing, however a session ended and whatever the clock says.
    """

    def __init__(self, folder: Path, records: Sequence[EpochRecord], note: Callable[[str], None]) -> None:
        self.note, self.file = note, None
        self.began = time.time() - (records[-1].seconds if records else 0.0)
        try:
            from fastcifar.runs.events import EventFile

            earlier = (EVENT_FILE.match(path.name) for path in folder.glob("events.*"))
            number = max((int(match[1]) for match in earlier if match), default=0) + 1
            self.file = EventFile(folder / f"events.out.tfevents.{number:010d}")
            for record in records:
                self.file.add(record.epoch, self.began + record.seconds, values(record))
        except Exception as error:  # packages that do not suit each other fail at import with nearly anything
            self.give_up(error)

    def write(self, record: EpochRecord) -> None:
        self.add(record.epoch, self.began + record.seconds, values(record))

    def final(self, epoch: int, accuracies: dict[str, float]) -> None:
        self.add(epoch, time.time(), {f"accuracy/final_test/{name}": value for name, value in accuracies.items()})

    def add(self, epoch: int, wall_time: float, values: dict[str, float]) -> None:
        if self.file:
            try:
                self.file.add(epoch, wall_time, values)
            except OSError as error:
                self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.close()
        self.note(f"TensorBoard has no more points ({reason(error)}); the run goes on, and metrics.jsonl has them all.")

    def close(self) -> None:
        if self.file:
            with suppress(OSError):
                self.file.close()
            self.file = None
