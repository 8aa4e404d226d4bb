"""The Python interface: the commands, with arguments in place of flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.engine import run as engine
from fastcifar.errors import FastcifarError
from fastcifar.inference import evaluate as evaluation
from fastcifar.inference import export as exports
from fastcifar.inference import predict as prediction
from fastcifar.recipes import recipe
from fastcifar.recipes.registry import derive, without_replaced
from fastcifar.runs.console import Console
from fastcifar.runs.folder import Result

P = ParamSpec("P")
R = TypeVar("R")
FLAG = re.compile(r"--([a-z][a-z0-9-]*)(?:[ =](?=[0-9])([0-9.e-]*[0-9]))?")
"""A flag in a sentence for the command line, and the number that may follow it."""


def speaks_of_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Makes error messages name `clip_norm=1` where the command line would be told `--clip-norm 1`."""

    def argument(match: re.Match[str]) -> str:
        return match[1].replace("-", "_") + (f"={match[2]}" if match[2] else "")

    @wraps(function)
    def translated(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except FastcifarError as error:
            error.args = (FLAG.sub(argument, str(error)),)
            raise

    return translated


@speaks_of_arguments
def train(
    config: RunConfig | str | None = None,
    out: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    train_set: ImageSet | None = None,
    test_set: ImageSet | None = None,
    console: Console | None = None,
    trust: bool = False,
    **settings: Any,
) -> Result:
    """Trains into a new run folder, as `fastcifar train` does.

    Args:
        config: the name of a recipe, or a whole configuration; by default the default settings.
        out: folder of the run, new or empty; `./runs/NAME-TIME` by default.
        model: your own network in place of `arch`: images (N, 3, H, W), normalised -> logits (N, classes). It is
            trained itself, not a copy, and holds the last weights at the end.
        train_set, test_set: your own images in place of `dataset`; both or none.
        console: where to show progress; by default only a notebook shows a bar.
        trust: whether a teacher's architecture of its own code (`package.module:function`) may be imported.
        **settings: changes to `config`, by the names of the flags, such as `epochs=2` or `augment="flip:0.5"`.

    Raises:
        FastcifarError: something asked for is unknown, missing, or cannot be done; nothing is left half-written.
        Interrupted: a signal stopped the run, which was saved.
    """
    start = recipe(config) if isinstance(config, str) else config or RunConfig()
    start = derive(without_replaced(start, settings), **settings)
    given = {"model": model, "train_set": train_set, "test_set": test_set}
    return engine.train(start, out, **given, console=console, trust=trust)


resume = speaks_of_arguments(engine.resume)
evaluate = speaks_of_arguments(evaluation.evaluate_run)
predict = speaks_of_arguments(prediction.predict)
export = speaks_of_arguments(exports.export_run)
