"""An event file of a run, as TensorBoard reads it, written without the thread that `SummaryWriter` hides errors in."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new file at `path`, whose first event voids all that a viewer has read from earlier files of the run."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "xb")  # noqa: SIM115
        self.write(Event(file_version="brain.Event:2"))
        self.write(Event(session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.write(Event(step=step, wall_time=wall_time, summary=Summary(value=points)))

    def write(self, event: Event) -> None:
        RecordWriter(self.file).write(event.SerializeToString())
        self.file.flush()

    def close(self) -> None:
        self.file.close()
