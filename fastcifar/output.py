"""What is printed: text that no terminal acts on, and an output that may be closed or full. Free of torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from fastcifar.errors import reason

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, marks that reverse the direction of text, and bytes that are not UTF-8."""


def printable(text: str) -> str:
    """Escapes what a terminal would act on or cannot show, since text from files is whatever a stranger wrote."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def show(text: object) -> None:
    """Prints the lines of `text`, each made `printable`."""
    print("\n".join(map(printable, str(text).split("\n"))))


def complain(text: object) -> None:
    """Prints one line on standard error, if that can still be written."""
    with suppress(OSError, ValueError):
        print(printable(str(text)), file=sys.stderr, flush=True)


def prepare_streams() -> None:
    """Reopens standard streams that are closed, and lets standard output escape what it cannot encode.

    Otherwise the next file to be opened, such as a checkpoint, would get the number of a closed one, and its text.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Drops what `stream` still holds and all that follows; otherwise the interpreter complains at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LastingOutput:
    """Standard output for training, which goes on without it: when it is closed or full, this says so once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, False

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # a ValueError where it was closed in Python
            self.lost = True
            discard(self.stream)
            complain(f"Standard output cannot be written ({reason(error)}); training goes on without it.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
