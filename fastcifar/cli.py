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

from fastcifar.checks import check_range
from fastcifar.config import EngineConfig, ModelConfig, RunConfig, ScheduleConfig
from fastcifar.errors import ConfigError, FastcifarError, unknown
from fastcifar.inference import TTA, ExportFormat
from fastcifar.recipes import recipe, select

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
class Plan:
    """Show the learning rate and the cost of a run, and what looks like a mistake, before anything trains."""

    run: RunConfig = field(default_factory=RunConfig)
    config: Path | None = None
    """Start from the config.json of another run; further flags override it."""
    out: Path = Path("plan.png")
    """A .png file for the picture of the learning rate."""


@dataclass(frozen=True)
class Eval:
    """Measure a run on its test set: accuracy, classes, calibration, mistakes, speed; the pictures go into its folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data_dir: Path | None = None
    """Folder to look for the data set in; the run's own by default."""
    weights: str | None = None
    """Weights to look at closely: weights, or an average such as ema-0.999; the best on the validation split, or else an average."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    images: tuple[str, ...] = ()
    """Further test sets: .npz files with images and labels, or IMAGES.npy,LABELS.npy."""
    per_class: bool = False
    """Print a line for each class."""
    speed: bool = False
    """Measure latency and throughput by batch size."""
    out: Path | None = None
    """Folder for evaluation.json and the pictures; `evaluation` in the run's by default."""
    trust: bool = False
    """Execute the code that the run's architecture names, if it is package.module:function."""


@dataclass(frozen=True)
class Predict:
    """Classify unlabelled images by one run, or by several together, into a .csv file."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs; several decide by the mean of their probabilities."""
    images: Path
    """A .npy or .npz file, a folder of pictures in the order of their paths, or a pickled CIFAR batch."""
    out: Path = Path("predictions.csv")
    """The table: index,prediction."""
    weights: str | None = None
    """Weights of each run: weights, or an average such as ema-0.999; the best on the validation split, or else an average."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    probabilities: bool = False
    """Add a column for each class."""
    trust: bool = False
    """Execute the code that a run's architecture names, if it is package.module:function."""


@dataclass(frozen=True)
class Ensemble:
    """Let several runs vote, chosen on their validation split: runs that are there, or seeds of a recipe, trained several at a time."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs; none with --recipe."""
    recipe: str | None = None
    """Train this recipe by several seeds first; the same command goes on where it was stopped."""
    seeds: str | None = None
    """Seeds of the recipe, such as 0..5 or 0,3,7; 0..10 by default."""
    epochs: int | None = None
    """In place of the recipe's own."""
    val_split: int | None = None
    """Training images set apart to choose by; as the recipe has it by default."""
    at_once: int | None = None
    """Runs at a time; by default as many as the CPU has threads, or as suit the GPU's memory."""
    out: Path | None = None
    """Folder of ensemble.json, and of the runs that are trained; ./runs/RECIPE-ensemble, or ./runs/ensemble, by default."""
    data_dir: Path | None = None
    """Folder to look for the data set in; the runs' own by default."""
    weights: str | None = None
    """Weights of each run: weights, or an average such as ema-0.999; the best on the validation split, or else an average."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    trust: bool = False
    """Execute the code that a run's architecture names, if it is package.module:function."""
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Export:
    """Write a run's network as a file that needs no fastcifar, from bytes to probabilities, with a model card."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    format: ExportFormat
    """safetensors (with the network as a Python file), torch (.pt2) or onnx."""
    out: Path | None = None
    """The file; `model` in the run's folder by default."""
    weights: str | None = None
    """Weights to export: weights, or an average such as ema-0.999; the best on the validation split, or else an average."""
    data_dir: Path | None = None
    """Folder to look for the data set in, on which the file is checked."""
    trust: bool = False
    """Execute the code that the run's architecture names, if it is package.module:function."""


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
    """Count the layers, parameters, FLOPs and activations of an architecture."""

    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: what training would use, and what to install or change; exits with 1 where it could not train."""

    device: str = "auto"
    """The device that would train: auto, cpu, cuda or cuda:INDEX."""
    data_dir: Path | None = None
    """Folder to look for CIFAR-10 in, before $FASTCIFAR_DATA and the user cache."""
    quick: bool = False
    """Do not try the compiler, which takes some seconds."""


@dataclass(frozen=True)
class Profile:
    """Train for a few steps, and show where their time goes."""

    run: RunConfig = field(default_factory=RunConfig)
    config: Path | None = None
    """Start from the config.json of another run; further flags override it."""
    steps: int = 16
    """Steps under the clock, rounded up to whole chunks of augmented images."""
    out: Path | None = None
    """Folder for the figures, the trace and the picture; ./profile-ARCH by default."""


@dataclass(frozen=True)
class Recipes:
    """List the recipes with their sources and claims, or describe some of them."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names, or globs such as 'r1_*'; all in one table by default."""


@dataclass(frozen=True)
class Reproduce:
    """Run recipes by seed, and set what comes out beside what was claimed; the same command goes on where it was stopped."""

    recipes: tyro.conf.Positional[tuple[str, ...]]
    """Names, or globs such as 'r1_*'."""
    seeds: int = 1
    """Runs of each recipe."""
    epochs: int | None = None
    """In place of the recipes' own; the rows say so."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs and of results.json."""
    data_dir: Path | None = None
    """Folder to look for the data set in, before $FASTCIFAR_DATA and the user cache."""
    engine: EngineConfig = field(default_factory=EngineConfig)


Command = Train | Plan | Eval | Predict | Ensemble | Export | Preview | Count | Doctor | Profile | Recipes | Reproduce


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
