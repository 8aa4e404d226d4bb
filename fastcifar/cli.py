"""The command line: one short function a command. What needs torch is imported inside them, so that help and refusals are immediate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastcifar.checks import check_range
from fastcifar.commands import (
    Command,
    Count,
    Doctor,
    Ensemble,
    Eval,
    Export,
    Plan,
    Predict,
    Preview,
    Profile,
    Recipes,
    Reproduce,
    Train,
)
from fastcifar.config import EngineConfig, ModelConfig, RunConfig, ScheduleConfig
from fastcifar.errors import ConfigError, FastcifarError, unknown
from fastcifar.recipes import recipe, select

EXIT_BAD_INPUT = 2
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcifar`; returns the exit status.

    That is 0; 1 where `doctor` finds that training could not run; 2 for bad input; 128 plus the number of the signal that stopped it.
    """
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


def parse(arguments: list[str]) -> Command:
    """The command that `arguments` ask for; for help and unknown flags, which tyro answers, it exits. Raises ConfigError."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ConfigError(unknown("command", arguments[0], COMMANDS))
    if value_of("--resume", arguments) and len(arguments) > (3 if "--resume" in arguments else 2):
        raise ConfigError("--resume RUN goes on with the settings of that run; leave the other flags out.")
    start = starting_point(arguments)
    defaults = {"train": Train(run=start), "plan": Plan(run=start), "profile": Profile(run=start), "count": Count(), "preview": Preview()}
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
    return without_replaced(start, arguments)


def without_replaced(start: RunConfig, arguments: list[str]) -> RunConfig:
    """`start` without the options of an architecture, an optimiser, a schedule or a loss that `arguments` replace by another."""

    def replaced(flag: str, current: str) -> bool:
        return value_of(flag, arguments) not in (None, current)

    if replaced("--arch", start.model.arch):
        start = replace(start, model=ModelConfig())
    if replaced("--optimizer", start.optim.optimizer):
        start = replace(start, optim=replace(start.optim, lr=None, momentum=None, weight_decay=None))
    if replaced("--schedule", start.schedule.schedule):
        start = replace(start, schedule=ScheduleConfig(warmup=start.schedule.warmup))
    if replaced("--loss", start.loss.loss):
        start = replace(start, loss=replace(start.loss, label_smoothing=None, gamma_pos=None, gamma_neg=None))
    return start


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


def plan(command: Plan) -> int:
    from fastcifar.diagnostics.plan import print_plan

    print_plan(command.run, command.out)
    return 0


def evaluate(command: Eval) -> int:
    from fastcifar.inference.evaluate import FOLDER, evaluate_run
    from fastcifar.inference.report import lines_of

    options = {"which": command.weights, "tta": command.tta, "pairs": command.images, "speed": command.speed}
    report = evaluate_run(command.run, command.data_dir, **options, out=command.out, trust=command.trust)
    for line in lines_of(report, command.per_class):
        print(line)
    print(f"{'pictures':10}  {command.out or command.run / FOLDER}")
    return 0


def predict(command: Predict) -> int:
    from fastcifar.inference.predict import predict

    options = {"which": command.weights, "tta": command.tta, "probabilities": command.probabilities, "trust": command.trust}
    count = predict(command.runs, command.images, command.out, **options)
    print(f"{count:,} predictions in {command.out}")
    return 0


def ensemble(command: Ensemble) -> int:
    if bool(command.runs) == bool(command.recipe):
        raise ConfigError("an ensemble is of runs or of a recipe; give folders of runs, or --recipe NAME with --seeds.")
    given = {name: getattr(command, name) for name in ("seeds", "epochs", "val_split", "at_once")}
    if command.runs and (any(value is not None for value in given.values()) or command.engine != EngineConfig()):
        raise ConfigError(
            "seeds, epochs, val_split, at_once and the engine's settings are for training; name a --recipe or leave them out."
        )
    out = command.out or Path("runs", f"{command.recipe}-ensemble" if command.recipe else "ensemble")
    options = {"data_dir": command.data_dir, "which": command.weights, "tta": command.tta, "trust": command.trust}
    from fastcifar.inference.members import evaluate_ensemble, lines_of
    from fastcifar.runs.interrupt import Interrupted

    try:
        runs = command.runs or trained_members(command, out)
    except Interrupted as stop:
        print("Stopped and saved; the same command goes on.", file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    for line in lines_of(evaluate_ensemble(runs, out, **options)):
        print(line)
    print(out / "ensemble.json")
    return 0


def trained_members(command: Ensemble, out: Path) -> list[Path]:
    """Folders of the recipe's runs, by seed, trained where they were not."""
    from fastcifar.engine.packed import plan_members, train_packed
    from fastcifar.runs.console import Console
    from fastcifar.runs.ensembles import parse_seeds

    settings = {name: getattr(command, name) for name in ("epochs", "val_split", "data_dir", "engine")}
    tasks = plan_members(select([command.recipe])[0], parse_seeds(command.seeds or "0..10"), out, **settings)
    train_packed(tasks, command.at_once, Console())
    return [task.folder for task in tasks]


def export(command: Export) -> int:
    from fastcifar.inference.export import export_run

    options = {"which": command.weights, "data_dir": command.data_dir, "trust": command.trust}
    made = export_run(command.run, command.format, command.out, **options)
    print(f"{made.weights}: equal to within {made.difference:.1e} on {made.checked}")
    for file in made.files:
        print(file)
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

    print_count(command.model)
    return 0


def doctor(command: Doctor) -> int:
    EngineConfig(device=command.device)
    from fastcifar.diagnostics.doctor import diagnose

    return diagnose(command.device, command.data_dir, quick=command.quick)


def profile(command: Profile) -> int:
    check_range("steps", command.steps, 1)
    from fastcifar.diagnostics.profile import print_profile

    print_profile(command.run, command.steps, command.out)
    return 0


def recipes(command: Recipes) -> int:
    from fastcifar.recipes.listing import description, overview

    print("\n\n".join(map(description, select(command.names))) if command.names else overview())
    return 0


def reproduce(command: Reproduce) -> int:
    chosen = select(command.recipes)
    from fastcifar.engine.reproduce import reproduce
    from fastcifar.runs.console import Console
    from fastcifar.runs.interrupt import Interrupted

    options = {name: getattr(command, name) for name in ("seeds", "epochs", "data_dir", "engine")}
    try:
        reproduce(chosen, command.out, **options, console=Console())
    except Interrupted as stop:
        print("Stopped and saved; the same command goes on.", file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (Train, train),
    "plan": (Plan, plan),
    "eval": (Eval, evaluate),
    "predict": (Predict, predict),
    "ensemble": (Ensemble, ensemble),
    "export": (Export, export),
    "count": (Count, count),
    "preview": (Preview, preview),
    "doctor": (Doctor, doctor),
    "profile": (Profile, profile),
    "recipes": (Recipes, recipes),
    "reproduce": (Reproduce, reproduce),
}


def command_name(command: Command) -> str:
    return next(name for name, (kind, _) in COMMANDS.items() if isinstance(command, kind))


if __name__ == "__main__":
    sys.exit(main())
