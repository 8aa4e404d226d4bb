"""The command line: one short function a command. What needs torch is imported inside them, so that help and refusals are immediate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastcifar.config import ModelConfig, RunConfig
from fastcifar.errors import ConfigError, FastcifarError, unknown
from fastcifar.recipes import recipe

EXIT_BAD_INPUT = 2
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells have it."""


@dataclass(frozen=True)
class Train:
    """Train a network, into a run folder."""

    run: RunConfig = field(default_factory=RunConfig)
    config: Path | None = None
    """Start from the config.json of another run; further flags override it."""
    out: Path | None = None
    """Folder of the run, new or empty; ./runs/NAME-TIME by default."""
    resume: Path | None = None
    """Go on with the run in this folder. It keeps its own settings, so no other flag goes with it."""


@dataclass(frozen=True)
class Eval:
    """Measure the test accuracy of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data_dir: Path | None = None
    """Folder to look for the data set in; the run's own by default."""


@dataclass(frozen=True)
class Count:
    """Count the layers, parameters and FLOPs of an architecture."""

    model: ModelConfig = field(default_factory=ModelConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcifar`; returns the exit status: 0, 2 for bad input, or 128 plus the number of the signal that stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = parse(arguments)
        return COMMANDS[command_name(command)][1](command)
    except FastcifarError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("fastcifar: stopped.", file=sys.stderr)
        return EXIT_SIGNALLED + 2


def parse(arguments: list[str]) -> Train | Eval | Count:
    """The command that `arguments` ask for; for help and unknown flags, which tyro answers, it exits. Raises ConfigError."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ConfigError(unknown("command", arguments[0], COMMANDS))
    if "--resume" in arguments and len(arguments) != 3:
        raise ConfigError("--resume RUN goes on with the settings of that run; leave the other flags out.")
    defaults = {"train": Train(run=starting_point(arguments)), "count": Count()}
    kinds: list[Any] = [
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **({"default": defaults[name]} if name in defaults else {}))]
        for name, (kind, _) in COMMANDS.items()
    ]
    description = "Trains CIFAR-class networks at the speed of the hardware."
    return tyro.cli(reduce(or_, kinds), prog="fastcifar", description=description, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def starting_point(arguments: list[str]) -> RunConfig:
    """The configuration that flags override: of --config or --recipe, where one is given. Raises ConfigError where it is not there."""
    given = {name: value_of(name, arguments) for name in ("--config", "--recipe")}
    if all(given.values()):
        raise ConfigError("--config and --recipe both name a configuration to start from; give one of them.")
    if given["--recipe"]:
        return recipe(given["--recipe"])
    if given["--config"]:
        path = Path(given["--config"])
        if not path.is_file():
            raise ConfigError(f"{path} is no file; give the config.json of a run.")
        return RunConfig.from_json(path.read_text(errors="replace"), str(path))
    return RunConfig()


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value that `--flag VALUE` or `--flag=VALUE` gives."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def train(command: Train) -> int:
    from fastcifar.engine.train import resume, train
    from fastcifar.runs.console import Console
    from fastcifar.runs.interrupt import Interrupted

    try:
        if command.resume:
            resume(command.resume, console=Console())
        else:
            train(command.run, command.out, console=Console())
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    return 0


def evaluate(command: Eval) -> int:
    from fastcifar.inference.evaluate import evaluate_run
    from fastcifar.runs.console import percent

    for weights, evaluation in evaluate_run(command.run, command.data_dir).items():
        print(f"{weights:10}  test accuracy {percent(evaluation.accuracy)}  loss {evaluation.loss:.4f}")
    return 0


def count(command: Count) -> int:
    from fastcifar.diagnostics.count import print_count

    print_count(command.model.arch, command.model.options)
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {"train": (Train, train), "eval": (Eval, evaluate), "count": (Count, count)}


def command_name(command: Train | Eval | Count) -> str:
    return next(name for name, (kind, _) in COMMANDS.items() if isinstance(command, kind))


if __name__ == "__main__":
    sys.exit(main())
