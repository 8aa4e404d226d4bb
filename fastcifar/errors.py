"""Errors for the user: one sentence each, shown without a traceback."""

import difflib
from collections.abc import Iterable


class FastcifarError(Exception):
    """An error that the user can fix; its text says what was wrong, what was expected and what to do."""


class ConfigError(FastcifarError):
    """A setting that cannot be used."""


class DataError(FastcifarError):
    """A data set that is missing, damaged or foreign."""


MOST_NAMES = 50
"""Names that a sentence lists at most."""


def reason(error: BaseException) -> str:
    """The first line of `error`'s message, shortened, without a full stop; the class name where it is empty."""
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "out of memory",
    "Cannot allocate memory",
    "bad_alloc",
    "could not create a memory",
    "can't start new thread",
)
"""Parts of the messages with which torch, oneDNN and the system say that there is no memory left."""


def is_memory_error(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on whatever device and in whichever library."""
    said = isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in MEMORY_TEXTS)
    return said or isinstance(error, MemoryError)


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """A sentence saying that `name` is no such `kind`, with the nearest valid names, or else all of a few."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if not nearest and len(valid) > MOST_NAMES:
        nearest = difflib.get_close_matches(name, valid, n=5, cutoff=0)
    if nearest:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?"
    return f"unknown {kind} {name!r}; choose one of {', '.join(valid)}."
