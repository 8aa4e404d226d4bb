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

KILLED = 99
"""The exit status of a process that a fault killed."""
BY_PATH = (
    "open stat access listdir scandir mkdir rmdir unlink remove rename replace link symlink chmod utime truncate"
).split()
BY_DESCRIPTOR = "read write fsync ftruncate".split()
CHANGING = {"mkdir", "rename", "replace", "write", "link", "symlink", "truncate", "ftruncate"}

Fault = Callable[["Call"], Any]


@dataclass(frozen=True)
class Call:
    """A call of a function of `os`, which has not been carried out yet."""

    name: str
    path: str
    writes: bool
    arguments: tuple = ()
    carry_out: Callable[..., Any] = print

    @property
    def by_path(self) -> bool:
        return self.name in BY_PATH

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


def kill(call: Call) -> None:
    os._exit(KILLED)


def tear(call: Call) -> None:
    """Kills the process in the middle of a write, and before any other call."""
    if call.name == "write":
        call.carry_out(call.arguments[0], call.arguments[1][: len(call.arguments[1]) // 2])
    os._exit(KILLED)


def short(call: Call) -> int:
    """Writes half of what it should, as the system may."""
    return call.carry_out(call.arguments[0], call.arguments[1][: (len(call.arguments[1]) + 1) // 2])


def fail(number: int) -> Fault:
    def raise_error(call: Call) -> None:
        raise OSError(number, os.strerror(number), call.path)

    return raise_error


@dataclass
class Watch:
    """While active, counts the calls below `folder`, and has `fault` meet number `at`, or all `from` there."""

    folder: Path
    fault: Fault | None = None
    at: int = -1
    lasting: bool = False
    calls: list[Call] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)
    """Paths of the open files below the folder, by descriptor."""

    def start(self) -> None:
        """Replaces the functions of `os` in this process, and `open` by its twin in Python, which calls them."""
        for name in (*BY_PATH, *BY_DESCRIPTOR, "close"):
            setattr(os, name, self.watched(name, getattr(os, name)))
        builtins.open = io.open = _pyio.open

    def watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            if name == "close":
                self.files.pop(arguments[0], None)
            path = self.path_of(arguments, options)
            if name == "close" or path is None:
                return original(*arguments, **options)
            writes = name in CHANGING or (name == "open" and arguments[1] & (os.O_WRONLY | os.O_RDWR) > 0)
            call = Call(name, path, writes, arguments, lambda *own: original(*(own or arguments), **options))
            self.calls.append(call)
            number = len(self.calls) - 1
            if self.fault and (number == self.at or (self.lasting and number > self.at)):
                return self.fault(call)
            result = call.carry_out()
            if name == "open":
                self.files[result] = path
            return result

        return function

    def path_of(self, arguments: tuple, options: dict[str, Any]) -> str | None:
        """The path that a call is about; None where it is not below the folder."""
        place = arguments[0] if arguments else "."
        if isinstance(place, int):
            return self.files.get(place)
        within = self.files.get(options.get("dir_fd") or options.get("src_dir_fd") or -1)
        path = Path(within or "", os.fsdecode(place))
        return str(path) if path.is_relative_to(self.folder) else None


def calls_of(action: Callable[[], object], folder: Path) -> list[Call]:
    """The calls below `folder` that the action makes in a child process; their paths are relative to it."""

    def act() -> None:
        watch = Watch(folder)
        watch.start()
        action()
        told = [(call.name, os.path.relpath(call.path, folder), call.writes) for call in watch.calls]
        print(json.dumps(told))

    return [Call(*told) for told in json.loads(in_child(act).output.splitlines()[-1])]
