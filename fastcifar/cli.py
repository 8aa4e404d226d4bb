"""The command line: one short function a command. What needs torch is imported inside them, so that help and refusals are immediate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
class Preview:
    """Draw what augmentation policies make of some images, as PNG pictures."""

    policies: tyro.conf.Positional[tuple[str, ...]] = ()
    """Policies, such as standard, autoaugment or crop:4,cutout:4x4; all that have a name by default."""
    augment: str | None = None
    """The same for one policy."""
    dataset: str = "auto"
    """Data set: a name, or the path of a .npz file, a folder of .npy files, or an image folder (PATH@32)."""
    data_dir: Path | None = None
    """Folder to look for the data set in."""
    out: Path = Path("preview")
    """A .png file; or a folder, which gets a page for each policy and all.png."""
    seed: int = 0
    """Of the augmentation."""
    epoch: int = 0
    """The epoch whose draws are shown."""
    count: int = 12
    """Images, evenly spread over the data set."""
    show_params: bool = False
    """Print what was drawn for each image."""


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


def parse(arguments: list[str]) -> Train | Eval | Count | Preview:
    """The command that `arguments` ask for; for help and unknown flags, which tyro answers, it exits. Raises ConfigError."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ConfigError(unknown("command", arguments[0], COMMANDS))
    if value_of("--resume", arguments) and len(arguments) > (3 if "--resume" in arguments else 2):
        raise ConfigError("--resume RUN goes on with the settings of that run; leave the other flags out.")
    defaults = {"train": Train(run=starting_point(arguments)), "count": Count(), "preview": Preview()}
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
    start = RunConfig()
    if given["--recipe"]:
        start = recipe(given["--recipe"])
    if given["--config"]:
        path = Path(given["--config"])
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); give the config.json of a run.") from error
        start = RunConfig.from_json(text, str(path))
    # Another architecture has other options: those of the one it takes the place of are not for it.
    return replace(start, model=ModelConfig()) if value_of("--arch", arguments) not in (None, start.model.arch) else start


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value that `--flag VALUE` or `--flag=VALUE` gives."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def train(command: Train) -> int:
    from fastcifar.engine.run import resume, train
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


def preview(command: Preview) -> int:
    from fastcifar.augment.policy import POLICIES, parse

    policies = (command.augment,) if command.augment else command.policies or tuple(POLICIES)
    for text in policies:
        parse(text)
    from fastcifar.data.sources import load_dataset, resolve_auto
    from fastcifar.diagnostics.preview import preview

    name = resolve_auto(command.data_dir)[0] if command.dataset == "auto" else command.dataset
    dataset = load_dataset(name, "train", command.data_dir)
    options = {"seed": command.seed, "epoch": command.epoch, "count": command.count, "show_params": command.show_params}
    for path in preview(policies, dataset, command.out, **options):
        print(path)
    return 0


def count(command: Count) -> int:
    from fastcifar.diagnostics.count import print_count

    print_count(command.model.arch, command.model.options)
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (Train, train),
    "eval": (Eval, evaluate),
    "count": (Count, count),
    "preview": (Preview, preview),
}


def command_name(command: Train | Eval | Count | Preview) -> str:
    return next(name for name, (kind, _) in COMMANDS.items() if isinstance(command, kind))


if __name__ == "__main__":
    sys.exit(main())
