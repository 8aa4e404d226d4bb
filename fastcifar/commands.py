"""The commands: what each takes and does. Torch is imported only when a command runs, so help is immediate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastcifar.checks import check_range
from fastcifar.config import EngineConfig, ModelConfig, RunConfig
from fastcifar.errors import ConfigError
from fastcifar.inference import TTA, ExportFormat, LabelForm, PrecisionName
from fastcifar.output import show
from fastcifar.recipes import Recipe, select

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""The type of an argument given by position, without a flag."""
Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, kw_only=True)
class Configured:
    """The arguments of commands that start from a configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    config: Path | None = None
    """Start from the config.json of another run; further flags override it."""
    trust: bool = False
    """Execute the code that a file names as its architecture, if it is package.module:function; what --arch names needs
    no trust."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The arguments of commands that read trained networks."""

    weights: str | None = None
    """Weights of each run: weights, or an average such as ema-0.999; the best on the validation split, or else an
    average. An ensemble says itself which vote."""
    trust: bool = False
    """Execute the code that a run's architecture names, if it is package.module:function."""


@dataclass(frozen=True, kw_only=True)
class Train(Configured):
    """Train a network, into a run folder."""

    out: Path | None = None
    """Folder of the run, new or empty; ./runs/NAME-TIME by default."""
    resume: Path | None = None
    """Go on with the run in this folder, by its own settings; the only flags beside it are --epochs, to train for
    longer than planned, and --trust."""

    def __call__(self) -> None:
        from fastcifar.engine.run import train
        from fastcifar.runs.console import Console

        train(self.run, self.out, console=Console(), trust=self.trust)


@dataclass(frozen=True)
class Resume:
    """The command that `train --resume RUN` runs."""

    run: Path
    epochs: int | None = None
    trust: bool = False

    def __call__(self) -> None:
        from fastcifar.engine.run import resume
        from fastcifar.runs.console import Console

        resume(self.run, epochs=self.epochs, console=Console(), trust=self.trust)


@dataclass(frozen=True, kw_only=True)
class Plan(Configured):
    """Show the learning rate and the cost of a run, and what looks like a mistake, before anything trains."""

    out: Path = Path("plan.png")
    """A .png file for the picture of the learning rate."""

    def __call__(self) -> None:
        from fastcifar.diagnostics.plan import print_plan

        print_plan(self.run, self.out)


@dataclass(frozen=True, kw_only=True)
class Eval(Trained):
    """Measure a run, or an ensemble, on its test set, and draw pictures of its mistakes."""

    run: Positional[Path]
    """Folder of the run, or of an ensemble, of which every member that votes is measured, and all of them together."""
    data_dir: Path | None = None
    """Folder to look for the data set in; the run's own by default."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    precision: PrecisionName = "auto"
    """What the networks compute in; auto is what they were trained in."""
    images: tuple[str, ...] = ()
    """Further test sets: .npz files with images and labels, or IMAGES.npy,LABELS.npy."""
    per_class: bool = False
    """Print a line for each class."""
    speed: bool = False
    """Measure latency and throughput by batch size."""
    out: Path | None = None
    """Folder for evaluation.json and the pictures; `evaluation` in the run's by default."""

    def __call__(self) -> None:
        from fastcifar.inference.evaluate import FOLDER, evaluate_run
        from fastcifar.inference.report import lines_of

        options = {"which": self.weights, "tta": self.tta, "pairs": self.images, "speed": self.speed}
        options |= {"precision": self.precision, "out": self.out, "trust": self.trust}
        report = evaluate_run(self.run, self.data_dir, **options)
        for line in lines_of(report, self.per_class):
            show(line)
        show(f"{'pictures':10}  {self.out or self.run / FOLDER}")


@dataclass(frozen=True, kw_only=True)
class Predict(Trained):
    """Classify unlabelled images by one run, or by several together, into a .csv file."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, or of ensembles, which stand for their members that vote. Several networks decide by the mean of
    their probabilities, in which each counts the same."""
    images: Path
    """A picture, a folder of pictures in the order of their paths, a .npy or .npz file, or a pickled CIFAR batch.
    Images of another size than the run's are cut to their largest centred square and resized."""
    out: Path = Path("predictions.csv")
    """The table, a row for each image."""
    columns: str | None = None
    """Titles of its first two columns, such as id,label; by default file,prediction for pictures, else
    index,prediction."""
    labels: LabelForm = "name"
    """Give the class by its name, or by its number."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    precision: PrecisionName = "auto"
    """What the networks compute in; auto is what they were trained in."""
    probabilities: bool = False
    """Add a column for each class."""

    def __call__(self) -> None:
        from fastcifar.inference.predict import TableForm, lines_of, write_predictions
        from fastcifar.runs.network import LoadOptions

        loading, form = LoadOptions(self.weights, self.trust), TableForm(self.columns, self.labels, self.probabilities)
        options = {"tta": self.tta, "precision": self.precision, "form": form}
        images, precision = write_predictions(self.runs, self.images, self.out, loading, **options)
        for line in lines_of(images, precision, self.out):
            show(line)


@dataclass(frozen=True, kw_only=True)
class Ensemble(Trained):
    """Let runs vote together, those that a validation split chooses; a recipe's runs are trained first."""

    runs: Positional[tuple[Path, ...]] = ()
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
    """Folder of ensemble.json, and of the runs that are trained; ./runs/RECIPE-ensemble, or ./runs/ensemble, by
    default."""
    data_dir: Path | None = None
    """Folder to look for the data set in; the runs' own by default."""
    weights: str | None = None
    """Weights of each run: weights, or an average such as ema-0.999; its snapshots, or else the best on the validation
    split, or else an average."""
    tta: TTA = "none"
    """Test-time augmentation: the mean over mirrored images as well, or over mirrored and shifted ones."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __call__(self) -> None:
        if bool(self.runs) == bool(self.recipe):
            raise ConfigError(
                "an ensemble is of runs or of a recipe; give folders of runs, or --recipe NAME with --seeds."
            )
        given = {name: getattr(self, name) for name in ("seeds", "epochs", "val_split", "at_once")}
        if self.runs and (any(value is not None for value in given.values()) or self.engine != EngineConfig()):
            raise ConfigError(
                "seeds, epochs, val_split, at_once and the engine's settings are for training; name a --recipe or "
                "leave them out."
            )
        chosen = select([self.recipe]) if self.recipe else []
        out = self.out or Path("runs", f"{self.recipe}-ensemble" if self.recipe else "ensemble")
        from fastcifar.many.ensemble import evaluate_ensemble, lines_of
        from fastcifar.runs.network import LoadOptions

        runs = self.runs or self.trained_members(chosen[0], out)
        loading = LoadOptions(self.weights, self.trust)
        for line in lines_of(evaluate_ensemble(runs, out, loading, data_dir=self.data_dir, tta=self.tta)):
            show(line)
        show(out / "ensemble.json")

    def trained_members(self, recipe: Recipe, out: Path) -> list[Path]:
        """Trains the recipe with each seed where not yet done; returns the run folders in the order of the seeds."""
        from fastcifar.many.jobs import Overrides
        from fastcifar.many.packed import parse_seeds, plan_members, train_packed
        from fastcifar.runs.console import Console

        overrides = Overrides(self.epochs, self.val_split, self.data_dir, self.engine)
        jobs = plan_members(recipe, parse_seeds(self.seeds or "0..10"), out, overrides)
        train_packed(jobs, self.at_once, Console())
        return [job.folder for job in jobs]


@dataclass(frozen=True, kw_only=True)
class Export(Trained):
    """Write the network of a run, or of an ensemble, and a model card, as files that need no fastcifar."""

    run: Positional[Path]
    """Folder of the run, or of an ensemble, whose members that vote become one file."""
    format: ExportFormat
    """safetensors (with the network as a Python file), torch (.pt2) or onnx."""
    out: Path | None = None
    """The file; `model` in the run's folder by default."""
    data_dir: Path | None = None
    """Folder to look for the data set in, on which the file is checked."""
    precision: PrecisionName | None = None
    """Also count the test images to which the trained network gives another class in this precision; the file computes
    in fp32."""

    def __call__(self) -> None:
        from fastcifar.inference.export import export_run, lines_of

        options = {"which": self.weights, "data_dir": self.data_dir, "precision": self.precision, "trust": self.trust}
        for line in lines_of(export_run(self.run, self.format, self.out, **options)):
            show(line)


@dataclass(frozen=True)
class Preview:
    """Draw what augmentation policies make of some images, as PNG pictures."""

    policies: Positional[tuple[str, ...]] = ()
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
    """Seed of the augmentation."""
    epoch: int = 0
    """The epoch whose draws are shown."""
    count: int = 12
    """Images, evenly spread over the data set."""
    show_params: bool = False
    """Print what was drawn for each image."""

    def __call__(self) -> None:
        from fastcifar.augment.policy import POLICIES, parse

        policies = (self.augment,) if self.augment else self.policies or tuple(POLICIES)
        for text in policies:
            parse(text)
        from fastcifar.data.sources import load_dataset, resolve_auto
        from fastcifar.diagnostics.preview import preview

        name = resolve_auto(self.data_dir)[0] if self.dataset == "auto" else self.dataset
        dataset = load_dataset(name, "train", self.data_dir)
        options = {"seed": self.seed, "epoch": self.epoch, "count": self.count, "show_params": self.show_params}
        for path in preview(policies, dataset, self.out, **options):
            show(path)


@dataclass(frozen=True)
class Count:
    """Count the layers, parameters, FLOPs and activations of an architecture."""

    model: ModelConfig = field(default_factory=ModelConfig)

    def __call__(self) -> None:
        from fastcifar.diagnostics.count import print_count

        print_count(self.model)


@dataclass(frozen=True)
class Doctor:
    """Say what training would use on this machine, and what to change; the exit status is 1 if it could not train."""

    device: str = "auto"
    """The device that would train: auto, cpu, cuda or cuda:INDEX."""
    data_dir: Path | None = None
    """Folder to look for CIFAR-10 in, before $FASTCIFAR_DATA and the user cache."""
    quick: bool = False
    """Do not try the compiler, which takes some seconds."""

    def __call__(self) -> int:
        EngineConfig(device=self.device)
        from fastcifar.diagnostics.doctor import diagnose

        return diagnose(self.device, self.data_dir, quick=self.quick)


@dataclass(frozen=True, kw_only=True)
class Profile(Configured):
    """Train for a few steps, and show where their time goes."""

    steps: int = 16
    """Steps under the clock, rounded up to whole chunks of augmented images."""
    out: Path | None = None
    """Folder for the figures, the trace and the picture; ./profile-ARCH by default."""

    def __call__(self) -> None:
        check_range("steps", self.steps, 1, 10_000)
        from fastcifar.diagnostics.profile import print_profile

        print_profile(self.run, self.steps, self.out, self.trust)


@dataclass(frozen=True)
class Recipes:
    """List the recipes with their sources and claims, or describe some of them."""

    names: Positional[tuple[str, ...]] = ()
    """Names, or globs such as 'r1_*'; all in one table by default."""

    def __call__(self) -> None:
        from fastcifar.recipes.listing import description, overview

        show("\n\n".join(map(description, select(self.names))) if self.names else overview())


@dataclass(frozen=True)
class Reproduce:
    """Train recipes by several seeds, and compare the results with the claims; repeat the command to go on."""

    recipes: Positional[tuple[str, ...]]
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

    def __call__(self) -> None:
        chosen = select(self.recipes)
        from fastcifar.many.jobs import Overrides
        from fastcifar.many.reproduce import reproduce
        from fastcifar.runs.console import Console

        overrides = Overrides(self.epochs, data_dir=self.data_dir, engine=self.engine)
        reproduce(chosen, self.out, overrides, seeds=self.seeds, console=Console())


@dataclass(frozen=True)
class Completion:
    """Print a script that lets a shell complete what is typed, for: source <(fastcifar completion bash)."""

    shell: Positional[Shell]
    """The shell that the script is for."""
    words: Positional[tuple[str, ...]] = ()
    """What the script asks for in turn: after `--`, the words of a line up to the one to complete."""

    def __call__(self) -> None:
        from fastcifar.completion import SCRIPTS, candidates

        for line in candidates(self.words, COMMANDS) if self.words else [SCRIPTS[self.shell]]:
            show(line)


COMMANDS: dict[str, type] = {
    "train": Train,
    "plan": Plan,
    "eval": Eval,
    "predict": Predict,
    "ensemble": Ensemble,
    "export": Export,
    "count": Count,
    "preview": Preview,
    "doctor": Doctor,
    "profile": Profile,
    "recipes": Recipes,
    "reproduce": Reproduce,
    "completion": Completion,
}
"""The commands by name. Calling one returns the exit status where it may be other than 0."""
