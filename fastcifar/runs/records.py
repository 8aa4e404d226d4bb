"""The record of each epoch, and the files it is written to."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastcifar.runs.files import reading, write_text, writing
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
    """By name of the average."""
    test_accuracy: float | None
    """Only with `watch_test`."""
    averaged_test_accuracies: dict[str, float]
    images_per_second: float
    seconds: float
    """Seconds since the run began, including compiling and interrupted sessions."""


class Sink(Protocol):
    def write(self, record: EpochRecord) -> None: ...

    def close(self) -> None: ...


def read_records(path: Path) -> list[EpochRecord]:
    """Reads a metrics.jsonl without a half-written last line. Raises FastcifarError where it is damaged."""
    if not os.path.exists(path):
        return []
    with reading(path, "delete it"):
        lines = path.read_text("utf-8").split("\n")[:-1]
    records = []
    for number, text in enumerate(lines, start=1):
        with reading(f"{path}, line {number},", "delete the line"):
            records.append(build(EpochRecord, json.loads(text), "record", complete=True))
    return records


class JsonLines:
    """Appends to metrics.jsonl, after cutting it back to the checkpoint's epochs. Raises FastcifarError on failure."""

    def __init__(self, path: Path, epochs_done: int) -> None:
        self.path = path
        kept = [record for record in read_records(path) if record.epoch <= epochs_done]
        write_text(path, "".join(map(line, kept)))
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


class TensorBoard:
    """Writes records to TensorBoard; purges epochs past the checkpoint. Raises FastcifarError where it cannot write."""

    def __init__(self, folder: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with writing(folder):
            self.writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def write(self, record: EpochRecord) -> None:
        self.add(record.epoch, values(record))

    def final(self, epoch: int, accuracies: dict[str, float]) -> None:
        self.add(epoch, {f"accuracy/final_test/{name}": accuracy for name, accuracy in accuracies.items()})

    def add(self, epoch: int, values: dict[str, float]) -> None:
        with writing(self.folder):
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, epoch)
            self.writer.flush()

    def close(self) -> None:
        with writing(self.folder):
            self.writer.close()
