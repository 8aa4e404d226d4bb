"""Commands that read trained networks; torch is imported only when one runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastcifar.config import EngineConfig
from fastcifar.errors import ConfigError
from fastcifar.inference import TTA, ExportFormat, LabelForm, PrecisionName
from fastcifar.output import show
from fastcifar.recipes import Recipe, select
from fastcifar.settings import Positional


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The arguments of commands that read trained networks."""

    weights: str | None = None
    """Weights of each run: weights, or an average such as ema-0.999; the best on the validation split, or else an
    average. An ensemble says itself which vote."""
    trust: bool = False
    """Execute the code that a run's architecture names, if it is package.module:function."""


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


@dataclass(frozen=True, kw_only=True)
class Landscape(Trained):
    """Draw the training loss around the weights of runs, side by side, along two random directions."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs."""
    points: int = 21
    """Places along each direction, an odd number."""
    radius: float = 1.0
    """How far to go; at 1 a direction is as long as the weights, filter by filter."""
    seed: int = 0
    """Seed of the directions."""
    images: int = 1000
    """Training images that the loss is the mean of."""
    out: Path = Path("landscape.png")
    """A .png file; the numbers go into a .json file beside it."""
    data_dir: Path | None = None
    """Folder to look for the data set in; each run's own by default."""

    def __call__(self) -> None:
        from fastcifar.inference.landscape import Grid, draw_landscapes
        from fastcifar.runs.network import LoadOptions

        grid, loading = Grid(self.points, self.radius, self.seed), LoadOptions(self.weights, self.trust)
        options = {"images": self.images, "data_dir": self.data_dir, "options": loading}
        for one in draw_landscapes(self.runs, self.out, grid, **options):
            show(f"{one.name}: loss {one.centre:.4g} at the weights, {one.edge:.4g} at {self.radius:g} from them")
            if one.changed:
                show(f"{one.name}: these are not the training images that the run had; its data set has changed since")
        show(str(self.out))
