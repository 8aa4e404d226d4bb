"""The command line: one short function a command. What needs torch is imported inside them, so that help and
refusals are immediate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcifar.arguments import parse
from fastcifar.checks import check_range
from fastcifar.commands import (
    Completion,
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
    Resume,
    Train,
)
from fastcifar.config import EngineConfig
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.recipes import Recipe, select
from fastcifar.runs.interrupt import Interrupted

EXIT_BAD_INPUT = 2
EXIT_SIGNALLED = 128
"""Plus the signal's number, as shells have it."""
SIGPIPE = 13
"""Which Windows does not name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `fastcifar`; returns the exit status.

    That is 0; 1 where `doctor` finds that training could not run; 2 for bad input; 128 plus the number of the signal
    that stopped it.
    """
    try:
        try:
            command = parse(sys.argv[1:] if arguments is None else arguments)
            return FUNCTIONS[type(command)](command)
        finally:
            sys.stdout.flush()
    except FastcifarError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    except KeyboardInterrupt:
        print("fastcifar: stopped.", file=sys.stderr)
        return EXIT_SIGNALLED + 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush complains
        return EXIT_SIGNALLED + SIGPIPE


def train(command: Train) -> int:
    from fastcifar.engine.run import train
    from fastcifar.runs.console import Console

    train(command.run, command.out, console=Console())
    return 0


def resume(command: Resume) -> int:
    from fastcifar.engine.run import resume
    from fastcifar.runs.console import Console

    resume(command.run, epochs=command.epochs, console=Console())
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
    from fastcifar.inference.predict import write_predictions
    from fastcifar.runs.network import LoadOptions

    loading = LoadOptions(command.weights, command.trust)
    options = {"tta": command.tta, "probabilities": command.probabilities}
    images = write_predictions(command.runs, command.images, command.out, loading, **options)
    if images.note:
        print(images.note)
    print(f"{len(images):,} prediction{'s' if len(images) > 1 else ''} in {command.out}")
    return 0


def ensemble(command: Ensemble) -> int:
    if bool(command.runs) == bool(command.recipe):
        raise ConfigError("an ensemble is of runs or of a recipe; give folders of runs, or --recipe NAME with --seeds.")
    given = {name: getattr(command, name) for name in ("seeds", "epochs", "val_split", "at_once")}
    if command.runs and (any(value is not None for value in given.values()) or command.engine != EngineConfig()):
        raise ConfigError(
            "seeds, epochs, val_split, at_once and the engine's settings are for training; name a --recipe or leave "
            "them out."
        )
    chosen = select([command.recipe]) if command.recipe else []
    out = command.out or Path("runs", f"{command.recipe}-ensemble" if command.recipe else "ensemble")
    from fastcifar.many.ensemble import evaluate_ensemble, lines_of
    from fastcifar.runs.network import LoadOptions

    try:
        runs = command.runs or trained_members(chosen[0], command, out)
    except Interrupted as stop:
        print("Stopped and saved; the same command goes on.", file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    loading = LoadOptions(command.weights, command.trust)
    report = evaluate_ensemble(runs, out, loading, data_dir=command.data_dir, tta=command.tta)
    for line in lines_of(report):
        print(line)
    print(out / "ensemble.json")
    return 0


def trained_members(recipe: Recipe, command: Ensemble, out: Path) -> list[Path]:
    """Folders of the recipe's runs, by seed, trained where they were not."""
    from fastcifar.many.jobs import Overrides
    from fastcifar.many.packed import parse_seeds, plan_members, train_packed
    from fastcifar.runs.console import Console

    overrides = Overrides(command.epochs, command.val_split, command.data_dir, command.engine)
    jobs = plan_members(recipe, parse_seeds(command.seeds or "0..10"), out, overrides)
    train_packed(jobs, command.at_once, Console())
    return [job.folder for job in jobs]


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
    from fastcifar.many.jobs import Overrides
    from fastcifar.many.reproduce import reproduce
    from fastcifar.runs.console import Console

    overrides = Overrides(command.epochs, data_dir=command.data_dir, engine=command.engine)
    try:
        reproduce(chosen, command.out, overrides, seeds=command.seeds, console=Console())
    except Interrupted as stop:
        print("Stopped and saved; the same command goes on.", file=sys.stderr)
        return EXIT_SIGNALLED + stop.signal_number
    return 0


def completion(command: Completion) -> int:
    from fastcifar.completion import SCRIPTS, candidates

    for line in candidates(command.words) if command.words else [SCRIPTS[command.shell]]:
        print(line)
    return 0


FUNCTIONS: dict[type, Callable[[Any], int]] = {
    Train: train,
    Resume: resume,
    Plan: plan,
    Eval: evaluate,
    Predict: predict,
    Ensemble: ensemble,
    Export: export,
    Count: count,
    Preview: preview,
    Doctor: doctor,
    Profile: profile,
    Recipes: recipes,
    Reproduce: reproduce,
    Completion: completion,
}


if __name__ == "__main__":
    sys.exit(main())
