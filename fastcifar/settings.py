"""What each command takes: the fields of its dataclass, and of the configurations within it, as arguments; free of
torch.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import POLICIES
from fastcifar.data.sources import DATASETS
from fastcifar.errors import ConfigError, unknown
from fastcifar.models import ARCHITECTURES
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.schedules import SCHEDULES
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
    """What stands under the field."""
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
        default = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        unsaid = self.default is False or self.default in (MISSING, None, ())
        facts = filter(None, (names, "" if unsaid else f"default: {'yes' if default is True else default}"))
        return f"{self.text} [{brackets}]" if (brackets := "; ".join(facts)) else self.text

    def read(self, text: str) -> Any:
        """One value. Raises ConfigError where `text` is none."""
        if self.choices and text not in self.choices:
            raise ConfigError(unknown(self.name.replace("_", " "), text, self.choices))
        try:
            return self.kind(text)
        except ValueError as error:
            expected = {int: "a whole number", float: "a number"}[self.kind]
            raise ConfigError(f"{self.flags[0]} is {text!r}; expected {expected}.") from error


def settings_of(kind: type, title: str = "") -> Iterator[Setting]:
    """The fields of a dataclass as arguments, those of the configurations within it last."""
    hints, parts = get_type_hints(kind, include_extras=True), []
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
        text = documentation(kind.__module__)[kind.__name__].get(field.name, "")
        yield Setting(field.name, positional, str if choices else hint, many, choices, field.default, text, kind, title)
    for part in parts:
        yield from settings_of(hints[part], TITLES.get(part, part))


@cache
def documentation(module: str) -> dict[str, dict[str, str]]:
    """By class and field, the text that stands under a field in the source of `module`."""
    texts = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            pairs = [
                (first.target, second.value)
                for first, second in pairwise(node.body)
                if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr)
            ]
            texts[node.name] = {
                ast.unparse(target): inspect.cleandoc(ast.literal_eval(value)) for target, value in pairs
            }
    return texts
