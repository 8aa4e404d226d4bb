"""What is read fits into memory: checked by what a file says of itself, before its contents are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import torch

from fastcifar.device import free_memory
from fastcifar.errors import DataError


def check_memory(needed: int, what: str) -> None:
    """Raises DataError where `needed` bytes of main memory are more than are free."""
    free = free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        found = f"{what} takes {needed / 2**20:,.0f} MiB of memory, and {free / 2**20:,.0f} MiB are free"
        raise DataError(f"{found}; make it smaller, or free some.")


class Room:
    """Memory that threads share: who wants more than is free beside the others waits for them to finish."""

    def __init__(self) -> None:
        self.taken = 0
        self.changed = Condition()

    @contextmanager
    def taking(self, needed: int, what: str) -> Iterator[None]:
        """Waits for `needed` bytes. Raises DataError where even a thread alone would not have them."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.fits(needed))
            check_memory(needed, what)
            self.taken += needed
        try:
            yield
        finally:
            with self.changed:
                self.taken -= needed
                self.changed.notify_all()

    def fits(self, needed: int) -> bool:
        free = free_memory(torch.device("cpu"))
        return free is None or self.taken + needed <= free
