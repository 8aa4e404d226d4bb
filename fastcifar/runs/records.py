"""What is recorded each epoch, and where it goes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastcifar.runs.files import write_text


@dataclass(frozen=True)
class EpochRecord:
    """One line of metrics.jsonl; accuracies are fractions, times seconds; what does not apply is None."""

    epoch: int
    """Counted from 1."""
    epochs: int
    step: int
    """Steps done."""
    lr: float
    """Of the last step."""
    train_loss: float
    train_accuracy: float
    """Running: of augmented images, with the weights of each step."""
    validation_loss: float | None
    validation_accuracy: float | None
    averaged_validation_accuracy: float | None
    test_accuracy: float | None
    """Only with `watch_test`."""
    averaged_test_accuracy: float | None
    images_per_second: float
    seconds: float
    """Since the run began, compiling and interrupted sessions included."""


class Sink(Protocol):
    """Somewhere records go."""

    def write(self, record: EpochRecord) -> None: ...

    def close(self) -> None: ...


def read_records(path: Path) -> list[EpochRecord]:
    """The records in a metrics.jsonl, those of a half-written last line left out."""
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    return [EpochRecord(**json.loads(line)) for line in whole]


class JsonLines:
    """Appends to metrics.jsonl, after cutting it back to the epochs that the checkpoint holds."""

    def __init__(self, path: Path, epochs_done: int) -> None:
        kept = [record for record in read_records(path) if record.epoch <= epochs_done]
        write_text(path, "".join(map(line, kept)))
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, record: EpochRecord) -> None:
        self.file.write(line(record))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def line(record: EpochRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"


TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "averaged_validation_accuracy": "accuracy/validation_averaged",
    "test_accuracy": "accuracy/test",
    "averaged_test_accuracy": "accuracy/test_averaged",
    "lr": "lr",
    "images_per_second": "img_per_s",
}
"""TensorBoard's name for each field of a record."""


class TensorBoard:
    """Writes loss, accuracies, learning rate and img/s by epoch; what an earlier session wrote past the checkpoint is purged."""

    def __init__(self, folder: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=epochs_done + 1 if epochs_done else None)

    def write(self, record: EpochRecord) -> None:
        for name, tag in TAGS.items():
            value = getattr(record, name)
            if value is not None:
                self.writer.add_scalar(tag, value, record.epoch)
        self.writer.flush()

    def final(self, epoch: int, accuracies: dict[str, float]) -> None:
        """The test accuracies at the end of the run."""
        for name, value in accuracies.items():
            self.writer.add_scalar(TAGS[name], value, epoch)

    def close(self) -> None:
        self.writer.close()
