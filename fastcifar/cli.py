"""The command line: parses arguments, shows help, refuses bad input. Imports no torch until a command runs."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn, get_type_hints

import fastcifar
from fastcifar.commands import COMMANDS, Ensemble, Reproduce, Resume
from fastcifar.config import RunConfig
from fastcifar.data.sources import check_data_dir
from fastcifar.errors import ConfigError, FastcifarError, is_memory_error, reason, unknown
from fastcifar.models import check_trusted
from fastcifar.output import complain, discard, prepare_streams
from fastcifar.recipes import recipe
from fastcifar.recipes.registry import derive, settings, without_replaced
from fastcifar.runs.interrupt import Interrupted
from fastcifar.settings import Setting, settings_of

EXIT_BAD_INPUT = 2
EXIT_SIGNALLED = 128
"""The signal's number is added, as in shells."""
SIGPIPE = 13
"""Windows has no name for this signal."""
HELP = {"-h", "--help"}

MEANT = {
    "arch": "architecture model net network",
    "augment": "augmentation transform",
    "batch-size": "batch batchsize bs",
    "clip-norm": "clip-grad grad-clip max-grad-norm",
    "data-dir": "data-path data-root root",
    "dataset": "data",
    "device": "gpu",
    "device cpu": "cpu",
    "device cuda": "cuda",
    "dropout": "drop-rate",
    "ema-decay": "ema",
    "epochs": "max-epochs n-epochs num-epochs",
    "label-smoothing": "label-smooth smoothing",
    "lr": "learning-rate",
    "normalize": "normalise",
    "optimizer": "opt optim optimiser",
    "out": "output output-dir save-dir",
    "precision": "amp dtype mixed-precision",
    "precision bf16": "bf16",
    "precision fp16": "fp16",
    "resume": "checkpoint",
    "schedule": "lr-schedule lr-scheduler scheduler",
    "seed": "random-seed",
    "sharpness sam": "sam",
    "stochastic-depth": "drop-path",
    "swa-start": "swa",
    "threads": "num-workers workers",
    "tta mirror": "mirror",
    "val-split": "validation-split",
    "warmup": "lr-warmup warmup-epochs",
    "weight-decay": "wd",
    "weight-init": "init",
}
SYNONYMS = {name: flag for flag, names in MEANT.items() for name in names.split()}
"""Flags of other programs, each with the flag to use here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `fastcifar` and returns the exit status.

    The status is 0; 1 where `doctor` finds that training could not run; 2 for bad input; or 128 plus the number of the
    signal that stopped it.
    """
    prepare_streams()
    try:
        try:
            command = parse(sys.argv[1:] if arguments is None else arguments)
            return command() or 0
        finally:
            sys.stdout.flush()
    except FastcifarError as error:
        complain(f"fastcifar: {error}")
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        goes_on = isinstance(command, Ensemble | Reproduce)
        complain("Stopped and saved; the same command goes on." if goes_on else stop)
        return EXIT_SIGNALLED + stop.signal_number
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        what_to_do = "close other programs, or take smaller batches or a smaller network"
        complain(f"fastcifar: memory ran out ({reason(error)}); {what_to_do}.")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        complain("fastcifar: stopped.")
        return EXIT_SIGNALLED + 2
    except BrokenPipeError:
        discard(sys.stdout)
        return EXIT_SIGNALLED + SIGPIPE
    except OSError as error:
        if error.filename is None:
            discard(sys.stdout)
        place = error.filename or "standard output"
        complain(f"fastcifar: {place} cannot be used ({reason(error)}); see that it is there and has room.")
        return EXIT_BAD_INPUT


class Help(argparse.HelpFormatter):
    """Writes several values as INT... and never breaks a name at its hyphen."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar}..." if action.nargs in ("+", "*") else super()._format_args(action, default_metavar)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; {self.prog} --help says what it takes.")


def parser_of(name: str, known: Sequence[Setting]) -> Parser:
    """Builds the parser of the command `name` for its settings `known`; its result holds only what is given."""
    needed = [f"{s.flags[0]} {s.metavar}" for s in known if s.flags and s.default is MISSING]
    places = [s.metavar if s.default is MISSING else f"[{s.metavar}]" for s in known if s.positional]
    parser = Parser(
        prog=f"fastcifar {name}",
        usage=" ".join(["fastcifar", name, *places, *needed, "[options]"]),
        description=inspect.getdoc(COMMANDS[name]),
        formatter_class=Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for a flag
    groups: dict[str, Any] = {"": parser}
    for setting in known:
        if setting.title not in groups:
            groups[setting.title] = parser.add_argument_group(
                setting.title, (inspect.getdoc(setting.part) or "").partition("\n")[0]
            )
        required = setting.default is MISSING
        options: dict[str, Any] = {"help": setting.help.replace("%", "%%")}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            several = "+" if setting.flags or required else "*"
            options |= {"type": setting.read, "metavar": setting.metavar, "nargs": several if setting.many else None}
        if setting.positional:
            parser.add_argument(setting.name, default=argparse.SUPPRESS, **options)
        else:
            groups[setting.title].add_argument(setting.flags[0], dest=setting.name, required=required, **options)
    return parser


def overview() -> str:
    parser = Parser(
        usage="fastcifar COMMAND [options]",
        description="Trains CIFAR-class networks at the speed of the hardware.",
        epilog="`fastcifar COMMAND --help` says what a command takes.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_argument_group("commands")
    for name, kind in COMMANDS.items():
        commands.add_argument(name, help=inspect.getdoc(kind))
    return parser.format_help()


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """Returns the command to run; prints help or the version and exits. Raises FastcifarError for bad input."""
    name, *rest = arguments or ["--help"]
    if name in (*HELP, "--version"):
        print(f"fastcifar {fastcifar.__version__}" if name == "--version" else overview().rstrip())
        sys.exit()
    if name not in COMMANDS:
        raise ConfigError(unknown("command", name, COMMANDS))
    given = given_settings(name, rest)
    if "resume" in given:
        if not given.keys() <= {"resume", "epochs", "trust"}:
            raise ConfigError(
                "--resume RUN keeps the settings of that run, but for --epochs N; leave the other flags out."
            )
        return Resume(given.pop("resume"), **given)
    check_data_dir(given.get("data_dir"))
    return build(COMMANDS[name], given)


def given_settings(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The values that `arguments` give to the command `name`, by field. Raises ConfigError."""
    known = list(settings_of(COMMANDS[name]))
    if HELP.isdisjoint(arguments):
        check_flags(name, arguments, {flag for setting in known for flag in setting.flags})
    else:
        known = with_defaults_of_start(name, known, arguments)
    given, stray = parser_of(name, known).parse_known_args(arguments)
    if stray:
        raise ConfigError(stray_value(name, stray[0], known))
    return {field: tuple(value) if isinstance(value, list) else value for field, value in vars(given).items()}


def with_defaults_of_start(name: str, known: Sequence[Setting], arguments: Iterable[str]) -> Sequence[Setting]:
    """The settings `known`, with the defaults of the recipe or file that `arguments` start from, for help."""
    if not any(setting.part is RunConfig for setting in known):
        return known
    origins = [setting for setting in known if setting.name in ("recipe", "config")]
    given, _ = parser_of(name, origins).parse_known_args([text for text in arguments if text not in HELP])
    start = settings(starting_point(vars(given)))
    return [replace(setting, default=start.get(setting.name, setting.default)) for setting in known]


def check_flags(command: str, arguments: Iterable[str], flags: Collection[str]) -> None:
    """Raises ConfigError, with the likely flag, where a flag among `arguments` is not in `flags`."""
    for argument in takewhile(lambda argument: argument != "--", arguments):
        flag = argument.partition("=")[0]
        if flag in flags or not re.match("--?[a-zA-Z]", flag):
            continue
        meant = {name: f"--{own}" for name, own in SYNONYMS.items() if f"--{own.split()[0]}" in flags}
        meant |= {own.removeprefix("--"): own for own in flags}
        nearest = get_close_matches(flag.lower().lstrip("-").replace("_", "-"), meant, n=1, cutoff=0.65)
        hint = f"did you mean {meant[nearest[0]]}?" if nearest else f"`fastcifar {command} --help` lists its flags."
        raise ConfigError(f"{command} knows no {flag}; {hint}")


def stray_value(command: str, value: str, known: Iterable[Setting]) -> str:
    """A sentence on a `value` that belongs to no flag."""
    flags = {name: setting.flags[0] for setting in known if setting.flags for name in setting.names}
    nearest = get_close_matches(value, flags, n=1, cutoff=0.8)
    hint = (
        f"did you mean {flags[nearest[0]]} {nearest[0]}?"
        if nearest
        else f"`fastcifar {command} --help` says what it takes."
    )
    return f"{command} cannot use {value!r}; {hint}"


def build(kind: type, given: Mapping[str, Any]) -> Callable[[], int | None]:
    """Builds the command `kind` and its configuration from the given values. Raises ConfigError."""
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):
        part: type = hints[field.name]
        if is_dataclass(part):
            start = without_replaced(starting_point(given), given) if part is RunConfig else part()
            if part is RunConfig and "arch" not in given:
                check_trusted(start.model.arch, given.get("config"), given.get("trust", False))
            own = settings(start)
            values[field.name] = derive(start, **{name: value for name, value in given.items() if name in own})
        elif field.name in given:
            values[field.name] = given[field.name]
    return kind(**values)


def starting_point(given: Mapping[str, Any]) -> RunConfig:
    """The configuration of --config or --recipe, else the default one. Raises ConfigError where it is not found."""
    start, path = RunConfig(), given.get("config")
    if path and "recipe" in given:
        raise ConfigError("--config and --recipe both name a configuration to start from; give one of them.")
    if "recipe" in given:
        start = recipe(given["recipe"])
    if path:
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({reason(error)}); give the config.json of a run.") from error
        start = RunConfig.from_json(text, str(path))
    return start


if __name__ == "__main__":
    sys.exit(main())
