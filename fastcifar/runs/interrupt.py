"""Turns Ctrl-C, SIGTERM and a lost terminal into a request that the training loop answers between steps."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a run to stop; Windows has no SIGHUP."""
STDERR = 2
NOTICE = b"stopping after this step; press Ctrl-C again to quit at once\n"


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, signal_number: int, run: Path) -> None:
        name, folder = signal.Signals(signal_number).name, shlex.quote(str(run))
        super().__init__(f"Stopped by {name} and saved; go on with: fastcifar train --resume {folder}")
        self.signal_number = signal_number


class StopRequest:
    """While entered, notes the first signal and says so; a second acts as uncaught. Ignored signals stay ignored."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.previous: dict[int, Any] = {}
        self.at_once = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self.note) for number in caught}
        return self

    @contextmanager
    def answered_at_once(self, run: Path) -> Iterator[None]:
        """Raises Interrupted as soon as a signal arrives within the block, in which `run` has nothing to save."""
        self.at_once = True
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(self.signal_number or signal.SIGINT, run) from None
        finally:
            self.at_once = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; it bypasses Python's output buffers, since it may interrupt them in mid-write."""
        self.signal_number = number
        self.restore()
        if self.at_once:
            raise KeyboardInterrupt
        with suppress(OSError):
            os.write(STDERR, NOTICE)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def __exit__(self, *exception: object) -> None:
        self.restore()
