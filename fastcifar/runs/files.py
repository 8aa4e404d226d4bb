"""Reads and writes files such that they are whole or absent, and reports damage in one sentence."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from fastcifar.errors import ConfigError, FastcifarError, reason
from fastcifar.serialization import build


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns an OSError within the block into a FastcifarError that says that `place` cannot be written."""
    try:
        yield
    except OSError as error:
        raise FastcifarError(
            f"{place} cannot be written ({reason(error)}); make room there, make it writable, or choose another folder."
        ) from error


@contextmanager
def reading(place: Path | str, remedy: str) -> Iterator[None]:
    """Turns damage met within the block into a FastcifarError that says what is wrong with `place`, and `remedy`."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError, ConfigError) as error:
        raise FastcifarError(f"{place} cannot be read ({reason(error)}); {remedy}.") from error


def exists(path: Path) -> bool:
    """Whether anything is at `path`. Raises FastcifarError where that is not known: only "not found" is absence."""
    with reading(path, "make it readable, or choose another place"):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def inside(folder: Path, name: str) -> Path:
    """Returns `folder`/`name`. Raises FastcifarError where it is a link: what is written there would go elsewhere."""
    path = folder / name
    with writing(path):
        if path.is_symlink():
            raise FastcifarError(f"{path} is a link that may lead out of {folder}; put what it leads to in its place.")
    return path


def check_regular(path: Path) -> None:
    """Raises OSError where `path` is missing, ValueError where it is a device or a pipe, whose end may never come."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """Reads `path` as a complete `kind`, a dataclass or TypedDict. Raises FastcifarError where that fails."""
    with reading(path, remedy):
        check_regular(path)
        return build(kind, json.loads(path.read_text("utf-8")), path.name, complete=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically, as `write_bytes` does. Raises FastcifarError where `path` cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` atomically by `content`. Raises FastcifarError where it cannot be written."""
    with appearing(path) as file:
        file.write(content)


@contextmanager
def appearing(path: Path, mode: Literal["x", "xb"] = "xb", **options: Any) -> Iterator[IO]:
    """Opens a file that replaces `path` at the end of the block, on the disk too; nothing remains if the block fails.

    `mode` and `options` are those of `open`. Raises FastcifarError where the file cannot be written.
    """
    partial = partial_of(path)
    with writing(path):
        partial.unlink(missing_ok=True)  # what a killed process left, or a link that leads elsewhere
        try:
            with open(partial, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(partial, path)
        except (Exception, KeyboardInterrupt):
            with suppress(OSError):
                partial.unlink()
            raise


def partial_of(path: Path) -> Path:
    """Returns the file that is written first, and then renamed to `path`."""
    return path.with_name(f".{path.name}.partial")


def publish(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`, in the same folder, and syncs the folder where the system allows it."""
    os.replace(partial, target)
    with suppress(OSError):  # Windows opens no folders, and some network file systems do not sync them
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
