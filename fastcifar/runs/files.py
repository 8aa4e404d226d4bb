"""Files that are whole or absent, and whose damage is told in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fastcifar.errors import ConfigError, FastcifarError, reason
from fastcifar.serialization import build


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Makes an OSError within the block a FastcifarError that says in one sentence that `place` cannot be written."""
    try:
        yield
    except OSError as error:
        raise FastcifarError(
            f"{place} cannot be written ({reason(error)}); make room there, make it writable, or choose another folder."
        ) from error


@contextmanager
def reading(place: Path | str, remedy: str) -> Iterator[None]:
    """Makes damage met within the block a FastcifarError that says what is wrong with `place`, and the `remedy`."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError, ConfigError) as error:
        raise FastcifarError(f"{place} cannot be read ({reason(error)}); {remedy}.") from error


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """The content of `path` as a `kind`, a dataclass or TypedDict that must be complete. Raises FastcifarError."""
    with reading(path, remedy):
        return build(kind, json.loads(path.read_text("utf-8")), path.name, complete=True)


def write_text(path: Path, text: str) -> None:
    """Writes `path` so that a reader finds either what was there before or all of `text`. Raises FastcifarError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `path` so that a reader finds either what was there before or all of `content`. Raises FastcifarError."""
    with appearing(path) as file:
        file.write(content)


@contextmanager
def appearing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file to write, which takes the place of `path` at the end of the block, on the disk too; where the block fails,
    nothing of it is left.

    Args:
        mode, options: as `open` has them.

    Raises:
        FastcifarError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
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


def publish(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`, which is beside it, and has the disk know where the system offers that."""
    os.replace(partial, target)
    with suppress(OSError):  # Windows opens no folders, and some network file systems do not sync them
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
