"""Errors for the user: one sentence each, shown without a traceback."""

import difflib
from collections.abc import Iterable


class FastcifarError(Exception):
    """An error that the user can fix; its text says what was wrong, what was expected and what to do."""


class ConfigError(FastcifarError):
    """A setting that cannot be used."""


class DataError(FastcifarError):
    """A data set that is missing, damaged or foreign."""


def reason(error: BaseException) -> str:
    """The first line of `error`'s message, shortened, without a full stop; the class name where it is empty."""
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """A sentence saying that `name` is no such `kind`, with the nearest valid names, or else all of them."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if nearest:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?"
    return f"unknown {kind} {name!r}; choose one of {', '.join(valid)}."
