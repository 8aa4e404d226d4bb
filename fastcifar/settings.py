"""What each command takes: the fields of its dataclass, and of the configurations within it, as arguments; free of
torch.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

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
"""By setting, the names that it takes, sometimes among other values; what is of a Literal type has its own."""

TITLES = {"model": "network", "optim": "optimiser", "average": "averages"}
"""How help calls a part of the configuration, where not by its name."""


@dataclass(frozen=True)
class Setting:
    """One field of a command, or of a configuration within it, as an argument."""

    name: str
    positional: bool
    kind: type
    """The type of one value: int, float, str, Path or bool."""
    many: bool
    """Whether it takes several values."""
    choices: tuple[str, ...]
    """The only values there are; empty where any of the kind will do."""
    default: Any
    """MISSING where it must be given."""
    text: str
    part: type
    """The dataclass that it is a field of."""
    title: str
    """The group that help shows it in; empty for a command's own."""

    @property
    def flags(self) -> tuple[str, ...]:
        """None for what is given by its place."""
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
        """The text, with the names and the default in brackets; the many recipes have a command that lists them."""
        names = "" if not self.names or self.names == tuple(RECIPES) else ", ".join(self.names)
        unsaid = self.default is False or self.default in (MISSING, None, ())
        default = defaults_of_choices(self.part, self.name) if unsaid else written(self.default)
        brackets = "; ".join(filter(None, (names, default and f"default: {default}")))
        return f"{self.text} [{brackets}]" if brackets else self.text

    def read(self, text: str) -> Any:
        """One value. Raises ConfigError where `text` is none."""
        if self.choices and text not in self.choices:
            raise ConfigError(unknown(self.name.replace("_", " "), text, self.choices))
        try:
            return self.kind(text)
        except ValueError as error:
            expected = {int: "a whole number", float: "a number"}[self.kind]
            raise ConfigError(f"{self.flags[0]} is {text!r}; expected {expected}.") from error


def written(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return " ".join(map(written, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def defaults_of_choices(part: type, setting: str) -> str:
    """The defaults that a `setting` has by what is chosen in its `part`, such as the schedule: the most common one,
    unless it is off or none, and where it is another.
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
    """By what may be chosen in a part of the configuration, what it reads there and the defaults of it."""
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
    """The fields of a dataclass as arguments, those of the configurations within it last."""
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
        text = documentation(field.metadata.get("home", kind))[field.name]
        yield Setting(field.name, positional, str if choices else hint, many, choices, field.default, text, kind, title)
    for part in parts:
        yield from settings_of(hints[part], TITLES.get(part, part))


@cache
def documentation(kind: type) -> dict[str, str]:
    """By field, the text that stands under it in the source of the dataclass `kind`."""
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
