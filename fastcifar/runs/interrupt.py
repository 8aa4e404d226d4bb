"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
NOTICE = b"stopping after this step; press Ctrl-C again to quit at once\n"


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, signal_number: int, run: Path) -> None:
        super().__init__(f"Stopped by {signal.Signals(signal_number).name} and saved; go on with: fastcifar train --resume {run}")
        self.signal_number = signal_number


class StopRequest:
    """While entered, the first signal is noted in `signal_number`, and said so; a second one acts as if it had not been caught."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler; it writes past Python's buffers, in the midst of whose work it may stand."""
        self.signal_number = number
        self.restore()
        with suppress(OSError):
            os.write(STDERR, NOTICE)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def __exit__(self, *exception: object) -> None:
        self.restore()
