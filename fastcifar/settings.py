"""The arguments of each command: the fields of its dataclass and of the nested configurations. Free of torch."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import POLICIES
from fastcifar.config import DISTILLATION, LOSSES, LossConfig
from fastcifar.data.sources import DATASETS
from fastcifar.errors import ConfigError, unknown
from fastcifar.models import ARCHITECTURES, ModelConfig
from fastcifar.models.resnet import ResNet
from fastcifar.optim import OPTIMIZERS, SHARPNESS, OptimConfig
from fastcifar.optim.schedules import SCHEDULES, ScheduleConfig
from fastcifar.recipes import RECIPES

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""The type of an argument given by position, without a flag."""

NAMES: dict[str, Collection[str]] = {
    "arch": ARCHITECTURES,
    "augment": POLICIES,
    "dataset": ("auto", *DATASETS),
    "device": ("auto", "cpu", "cuda"),
    "loader": ("auto", *BACKENDS),
    "names": RECIPES,
    "normalize": NORMALIZATIONS,
    "optimizer": OPTIMIZERS,
    "policies": POLICIES,
    "recipe": RECIPES,
    "recipes": RECIPES,
    "schedule": SCHEDULES,
}
"""The names that a setting accepts, sometimes among other values. A Literal type lists its own."""

TITLES = {"model": "network", "optim": "optimiser", "average": "averages"}
"""The titles in help of the parts of the configuration, where they differ from the field's name."""


@dataclass(frozen=True)
class Setting:
    """A field of a command, or of a nested configuration, as an argument."""

    name: str
    positional: bool
    kind: type
    """The type of one value: int, float, str, Path or bool."""
    many: bool
    """Whether the argument takes several values."""
    choices: tuple[str, ...]
    """The only valid values; empty where any value of the type will do."""
    default: Any
    """The default value; MISSING where the argument is required."""
    text: str
    part: type
    """The dataclass that has the field."""
    title: str
    """The group in help; empty for a command's own arguments."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that set the field; none for a positional argument."""
        flag = f"--{self.name.replace('_', '-')}"
        return () if self.positional else (flag, f"--no-{flag[2:]}") if self.kind is bool else (flag,)

    @property
    def names(self) -> tuple[str, ...]:
        return self.choices or tuple(NAMES.get(self.name, ()))

    @property
    def metavar(self) -> str:
        if self.positional:
            return self.name.upper()
        return "NAME" if self.names else {int: "INT", float: "NUMBER", Path: "PATH"}.get(self.kind, "TEXT")

    @property
    def help(self) -> str:
        """The help text with names and default in brackets; recipes are left out, since a command lists them."""
        names = "" if not self.names or self.names == tuple(RECIPES) else ", ".join(self.names)
        unsaid = self.default is False or self.default in (MISSING, None, ())
        default = defaults_of_choices(self.part, self.name) if unsaid else written(self.default)
        brackets = "; ".join(filter(None, (names, default and f"default: {default}")))
        return f"{self.text} [{brackets}]" if brackets else self.text

    def read(self, text: str) -> Any:
        """Converts one value. Raises ConfigError where `text` is invalid."""
        if "\0" in text:
            raise ConfigError(
                f"{self.flags[0] if self.flags else self.metavar} is {text!r}; expected text without NUL."
            )
        if self.kind is Path and os.path.expanduser(text).startswith("~"):
            raise ConfigError(f"{text} begins with the name of an unknown user; give another path, or write ./{text}.")
        if self.choices and text not in self.choices:
            raise ConfigError(unknown(self.name.replace("_", " "), text, self.choices))
        try:
            return self.kind(text)
        except ValueError as error:
            expected = {int: "a whole number", float: "a number"}[self.kind]
            raise ConfigError(f"{self.flags[0]} is {text!r}; expected {expected}.") from error


def written(value: Any) -> str:
    """Formats a value as a flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(written, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def defaults_of_choices(part: type, setting: str) -> str:
    """The defaults of `setting` for each choice in its `part`, such as each schedule, as text.

    The most common default comes first, unless it is off or none; the others follow with the choices that have them.
    """
    names: dict[Any, list[str]] = {}
    for name, defaults in choices_of(part).items():
        if setting in defaults:
            names.setdefault(defaults[setting], []).append(name)
    unsaid = names.pop(None, None)
    common, *others = sorted(names, key=lambda value: -len(names[value])) or [False]
    if unsaid:
        return "; ".join(f"{written(value)} in {', '.join(names[value])}" for value in names)
    if common is False and not others:
        return ""
    return "; ".join([written(common), *(f"{written(value)} in {', '.join(names[value])}" for value in others)])


def choices_of(part: type) -> Mapping[str, Mapping[str, Any]]:
    """For each choice in a part of the configuration, the settings that it reads and their defaults."""
    if part is ModelConfig:
        own = {field.name: field.default for field in fields(ResNet)}
        presets = {name: own | dict(entry.preset) for name, entry in ARCHITECTURES.items()}
        return {name: {option: presets[name][option] for option in ARCHITECTURES[name].options} for name in presets}
    if part is OptimConfig:
        return {name: entry.defaults for name, entry in OPTIMIZERS.items()} | SHARPNESS
    if part is ScheduleConfig:
        return {name: ScheduleConfig(name).defaults for name in SCHEDULES}
    return LOSSES | {"a teacher's": DISTILLATION} if part is LossConfig else {}


def settings_of(kind: type, title: str = "") -> Iterator[Setting]:
    """The fields of a dataclass as arguments, with those of nested configurations last."""
    hints = get_type_hints(kind, include_extras=True)
    parts: list[str] = []
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            parts.append(field.name)
            continue
        if positional := get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        if type(None) in get_args(hint):
            hint = get_args(hint)[0]
        if many := get_origin(hint) is tuple:
            hint = get_args(hint)[0]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        owner = next(base for base in kind.__mro__ if field.name in vars(base).get("__annotations__", {}))
        text = documentation(field.metadata.get("home", owner))[field.name]
        yield Setting(field.name, positional, str if choices else hint, many, choices, field.default, text, kind, title)
    for part in parts:
        yield from settings_of(hints[part], TITLES.get(part, part))


@cache
def documentation(kind: type) -> dict[str, str]:
    """The docstring under each field in the source of the dataclass `kind`."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[kind.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    return {
        ast.unparse(first.target): inspect.cleandoc(ast.literal_eval(second.value))
        for first, second in pairwise(body)
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr)
    }
