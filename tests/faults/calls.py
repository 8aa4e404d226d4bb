"""Watches every file-system call below a folder, and has one of them meet a fault."""

from __future__ import annotations

import _pyio
import builtins
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .harness import in_child

BY_PATH = "open stat listdir scandir mkdir rmdir unlink remove rename replace link symlink chmod truncate".split()
BY_DESCRIPTOR = "read write fsync ftruncate close".split()
CHANGING = {"mkdir", "rename", "replace", "write", "link", "symlink", "truncate", "ftruncate"}


@dataclass(frozen=True)
class Call:
    """A call of a function of `os`."""

    name: str
    path: str
    changes: bool
    """Whether it takes room on the disk."""

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


Half = Callable[[], int]
Fault = Callable[[Call, Half], Any]
"""Stands in for a call, given a way to write the first half of what it should write."""


def kill(call: Call, half: Half) -> None:
    os._exit(99)


def tear(call: Call, half: Half) -> None:
    half()
    os._exit(99)


def shorten(call: Call, half: Half) -> int:
    return half()


def fail(number: int) -> Fault:
    def raise_error(call: Call, half: Half) -> None:
        raise OSError(number, os.strerror(number), call.path)

    return raise_error


@dataclass
class Watch:
    """Once started, notes the calls below `folder`; `fault` meets number `at`, or all from there on if it lasts."""

    folder: Path
    fault: Fault | None = None
    at: int = -1
    lasting: bool = False
    calls: list[Call] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)
    """Paths of the open files below the folder, by descriptor."""

    def start(self) -> None:
        """Replaces the functions of `os` in this process, and `open` by its twin in Python, which calls them."""
        for name in (*BY_PATH, *BY_DESCRIPTOR):
            setattr(os, name, self.watched(name, getattr(os, name)))
        builtins.open = io.open = _pyio.open

    def watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*given: Any, **options: Any) -> Any:
            if name == "close":
                self.files.pop(given[0], None)
            path = self.path_of(given[0] if given else ".", options)
            if path is None:
                return original(*given, **options)
            opened_to_write = name == "open" and given[1] & (os.O_WRONLY | os.O_RDWR) > 0
            call, number = Call(name, path, name in CHANGING or opened_to_write), len(self.calls)
            self.calls.append(call)
            if self.fault and (number == self.at or (self.lasting and number > self.at)):
                return self.fault(call, lambda: original(given[0], given[1][: (len(given[1]) + 1) // 2]))
            result = original(*given, **options)
            if name == "open":
                self.files[result] = path
            return result

        return function

    def path_of(self, place: Any, options: dict[str, Any]) -> str | None:
        """The path that a call is about; None where it is not below the folder."""
        if isinstance(place, int):
            return self.files.get(place)
        within = self.files.get(options.get("dir_fd", options.get("src_dir_fd")), "")
        path = Path(within, os.fsdecode(place))
        return str(path) if path.is_relative_to(self.folder) else None


def calls_of(action: Callable[[], object], folder: Path) -> list[Call]:
    """The calls below `folder` that the action makes in a child process; their paths are relative to it."""

    def act() -> None:
        watch = Watch(folder)
        watch.start()
        action()
        print(json.dumps([(call.name, os.path.relpath(call.path, folder), call.changes) for call in watch.calls]))

    return [Call(*told) for told in json.loads(in_child(act).output.splitlines()[-1])]
