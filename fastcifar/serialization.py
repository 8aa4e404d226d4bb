"""Builds dataclasses and TypedDicts from JSON, checking every key and type. Free of torch."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from fastcifar.errors import ConfigError, unknown


def build(kind: Any, value: Any, where: str, *, complete: bool = False) -> Any:
    """Converts `value`, as read from JSON, to the type `kind`.

    Args:
        kind: a dataclass, a TypedDict, or the type of one of their fields.
        value: the result of `json.loads`.
        where: how the error message begins.
        complete: also require the keys of a dataclass that have defaults, but for None and False, which stand for what
            an older version did not know; a TypedDict says itself which it needs.

    Raises:
        ConfigError: keys are missing or unknown, or a value has another type or is refused by the dataclass.
    """
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return build_record(kind, value, where, complete)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else build(arguments[0], value, where, complete=complete)
    if origin in (tuple, list) and isinstance(value, list):
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        if len(kinds) == len(value):
            return origin(
                build(part, entry, where, complete=complete) for part, entry in zip(kinds, value, strict=True)
            )
    if origin is dict and isinstance(value, dict):
        return {key: build(arguments[1], entry, f"{where}: {key}", complete=complete) for key, entry in value.items()}
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} is {reprlib.repr(value)}; expected text without the character NUL.")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if kind is Any or (origin is Literal and value in arguments) or (isinstance(kind, type) and type(value) is kind):
        return value
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    if origin is Literal:
        expected = " or ".join(map(str, arguments))
    raise ConfigError(f"{where} is {reprlib.repr(value)}; expected {expected}.")


def build_record(kind: Any, value: Any, where: str, complete: bool) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {reprlib.repr(value)}; expected an object with the keys {', '.join(hints)}.")
    for key in value:
        if key not in hints:
            raise ConfigError(f"{where}: {unknown('key', key, hints)}")
    if typing.is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        needed = {field.name for field in dataclasses.fields(kind) if is_needed(field, complete)}
    if missing := [key for key in hints if key in needed and key not in value]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}, so it is damaged or another version's.")
    entries = {key: build(hints[key], entry, f"{where}: {key}", complete=complete) for key, entry in value.items()}
    try:
        return kind(**entries)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def is_needed(field: dataclasses.Field[Any], complete: bool) -> bool:
    if field.default is field.default_factory is dataclasses.MISSING:
        return True
    return complete and field.default is not None and field.default is not False
