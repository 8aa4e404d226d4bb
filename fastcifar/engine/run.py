"""From a configuration to a finished run folder."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastcifar.analysis.picture import draw
from fastcifar.analysis.plots import plot_run
from fastcifar.config import EngineConfig, ModelConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.device import (
    DTYPES,
    device_name,
    keep_freed_memory,
    matmul_flops_per_second,
    peak_memory_bytes,
    resolve_device,
)
from fastcifar.engine import snapshot
from fastcifar.engine.compile import keep_artefacts
from fastcifar.engine.memory import DataSize, fit_to_memory, limit_memory
from fastcifar.engine.resolve import resolve
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError, reason
from fastcifar.models import GIVEN
from fastcifar.models.count import count_model, count_network
from fastcifar.models.plug_ins import checked, refused
from fastcifar.optim.schedules import Duration, in_steps, lr_table
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import WEIGHTS
from fastcifar.runs.console import Console, notebook_console
from fastcifar.runs.folder import Result, Run, check_free
from fastcifar.runs.interrupt import Interrupted, StopRequest
from fastcifar.runs.records import EpochRecord, JsonLines, Sink, TensorBoard, read_records

CHECKPOINT_SHARE = 0.02
"""Most of the time that may go into checkpoints; large networks write hundreds of megabytes, and skip epochs for it."""


def train(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    train_set: ImageSet | None = None,
    test_set: ImageSet | None = None,
    console: Console | None = None,
) -> Result:
    """Trains as `config` says, in a new run folder.

    Args:
        config: the whole configuration.
        out: folder of the run, new or empty; `./runs/NAME-TIME` by default.
        model: a network of one's own in place of the one that `config` names: images (N, 3, H, W), normalised -> logits
        (N, classes). It
            is trained itself, not a copy, and holds the last weights at the end.
        train_set, test_set: images of one's own in place of those that `config` names; both or none.
        console: where to show progress; a notebook shows it by default, and nothing else does.

    Raises:
        FastcifarError: something asked for is not there or cannot be done; nothing is left half-written.
        Interrupted: the run was stopped by a signal, and saved.
    """
    console = console or notebook_console()
    began = time.perf_counter()
    if out is not None:
        check_free(Path(out))
    config, notes = resolve(naming_what_is_given(config, model, train_set))
    images = open_images(config, train_set, test_set)
    with naming_failures():
        trainer = build_trainer(config, began, images, model)
    run = Run.create(Path(out) if out else None, trainer.config)
    with run.locked():
        if trainer.memory and (config.engine.memory_limit or trainer.memory.passes > 1):
            notes.append(str(trainer.memory))
        for note in notes:
            console.note(note, prominent=True)
        return carry_out(run, trainer, images.test, console)


def resume(
    path: str | Path,
    *,
    epochs: int | None = None,
    model: nn.Module | None = None,
    train_set: ImageSet | None = None,
    test_set: ImageSet | None = None,
    console: Console | None = None,
) -> Result:
    """Goes on with the run in the folder `path` from its last checkpoint, with the choices stored there.

    Args:
        path: the run's folder.
        epochs: train for so many in all, more than the run was made for; it may have ended already.
        model, train_set, test_set: what was given to `train`, given again.
        console: where to show progress; a notebook shows it by default, and nothing else does.

    Raises:
        FastcifarError: as `train`; or the checkpoint is damaged, or `epochs` are not more than the run's.
        Interrupted: the run was stopped by a signal, and saved.
    """
    console, began = console or notebook_console(), time.perf_counter()
    run = Run.open(Path(path))
    with run.locked():
        finished, stored = run.result(), run.config()
        if finished is not None and epochs is None:
            console.note(f"{run.path} has ended already; --epochs beyond its {stored.epochs} would make it go on.")
            return finished
        images = open_images(stored, train_set, test_set)
        config = stored if epochs is None else lengthened(stored, epochs, images.steps_per_epoch(stored), run.path)
        with naming_failures():
            trainer = build_trainer(config, began, images, model)
            state = checkpoints.load(run.checkpoints)
            if state is not None:
                snapshot.restore(trainer, state)
        console.note(f"Going on with {run.path} after epoch {trainer.epoch} of {config.epochs}.")
        if epochs is not None:
            console.note(change_of_rate(stored, trainer), prominent=True)
            run.set_aside_result(stored.epochs)
        return carry_out(run, trainer, images.test, console)


@dataclass(frozen=True)
class Images:
    """The data set of a run, whole."""

    train: ImageSet
    """Those that are set apart for validation included."""
    test: ImageSet

    def steps_per_epoch(self, config: RunConfig) -> int:
        return (len(self.train) - config.data.val_split) // config.batch_size


def naming_what_is_given(config: RunConfig, model: nn.Module | None, train_set: ImageSet | None) -> RunConfig:
    """`config`, in which a network and images that were given in Python are called so."""
    if model is not None:
        config = replace(config, model=ModelConfig(GIVEN, max_params=config.model.max_params))
    return config if train_set is None else replace(config, data=replace(config.data, dataset=GIVEN))


def open_images(config: RunConfig, train_set: ImageSet | None, test_set: ImageSet | None) -> Images:
    """What was given, or else the data set that `config` names. Raises FastcifarError where that is not to be had."""
    if (train_set is None) != (test_set is None):
        raise ConfigError("train_set and test_set belong together; give both or none.")
    if train_set is not None and test_set is not None:
        if train_set.classes != test_set.classes or train_set.images.shape[1:] != test_set.images.shape[1:]:
            raise ConfigError(
                "train_set and test_set differ in their classes or in the size of their images; give two of a kind."
            )
        return Images(train_set, test_set)
    return Images(*(load_dataset(config.data.dataset, split, config.data.data_dir) for split in ("train", "test")))


def lengthened(config: RunConfig, epochs: int, steps_per_epoch: int, path: Path) -> RunConfig:
    """`config` for more epochs, such that what was done stays as it was: lengths that are shares of the run become
    those in steps.

    Only a schedule that ends with the run still does. Raises ConfigError where there are not more epochs.
    """
    if epochs <= config.epochs:
        raise ConfigError(f"{path} is a run of {config.epochs} epochs; give more with --epochs, or leave it out.")
    total = steps_per_epoch * config.epochs
    schedule, start = in_steps(config.schedule, steps_per_epoch, config.epochs), config.average.swa_start
    swa_start = start and f"{Duration.parse(start).steps(steps_per_epoch, total)}st"
    return replace(config, epochs=epochs, schedule=schedule, average=replace(config.average, swa_start=swa_start))


def change_of_rate(stored: RunConfig, trainer: Trainer) -> str:
    """What more epochs than `stored` had do to the learning rate."""
    done, config = trainer.steps_done, trainer.config
    before = lr_table(stored.schedule, stored.optim.peak_lr(stored.batch_size), trainer.steps_per_epoch, stored.epochs)
    was = f"would have gone on at {before[done]:.4g}" if done < len(before) else f"had come to {before[-1]:.4g}"
    return (
        f"{config.epochs} epochs in place of {stored.epochs}: {config.schedule.schedule} is laid out for all of "
        "them, so the learning rate "
        f"goes on at {trainer.unscaled_lr[done]:.4g}, where it {was}."
    )


def build_trainer(
    config: RunConfig, began: float | None = None, images: Images | None = None, model: nn.Module | None = None
) -> Trainer:
    """The trainer of a resolved configuration, laid out for the memory there is."""
    prepare_machine(config.engine)
    images = images or open_images(config, None, None)
    full, test = images.train, images.test
    size = DataSize(len(full), len(test), len(full.classes), full.images.shape[1])
    if model is None:
        options = {"classes": size.classes, "image_size": size.image_size, **config.model.options}
        count = count_network(config.model.arch, **options)
    else:
        model = fitting(model, size.classes, size.image_size)
        count = count_model(copy.deepcopy(model), size.image_size)
    device = torch.device(config.engine.device)
    config, plan = fit_to_memory(config, size, device, DTYPES[config.engine.precision].itemsize, count)
    training, validation = full, None
    if config.data.val_split:
        kept, apart = validation_split(full.labels, config.data.val_split, config.data.split_seed, len(full.classes))
        training, validation = full.subset(kept), full.subset(apart)
    trainer = Trainer(config, training, validation, test if config.watch_test else None, began, plan, model)
    trainer.count = count
    return trainer


def fitting(model: nn.Module, classes: int, image_size: int) -> nn.Module:
    """`model` itself, once it has classified two images. Raises ConfigError where it does not."""
    name = f"model={type(model).__name__}(...)"
    with refused(name, f"{image_size}x{image_size} images and {classes} classes"):
        return checked(model.cpu(), classes, image_size)


def prepare_machine(engine: EngineConfig) -> None:
    """Settings of the whole process that a run relies on."""
    if engine.threads:
        torch.set_num_threads(engine.threads)
    keep_artefacts()
    device = resolve_device(engine.device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        if engine.memory_limit_bytes:
            limit_memory(engine.memory_limit_bytes, device)
        torch.backends.cudnn.benchmark = not engine.deterministic
        torch.backends.cudnn.benchmark_limit = 0  # tries all algorithms, once for each shape; by default ten
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = engine.precision != "fp32"
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(engine.deterministic)


def carry_out(run: Run, trainer: Trainer, test: ImageSet, console: Console) -> Result:
    """Trains to the end, keeping the folder in step, and writes the result."""
    config = trainer.config
    console.note(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on "
        f"{config.data.dataset} "
        f"({len(trainer.loader.dataset):,} images), {device_name(trainer.device)}, {trainer.precision.name}, seed "
        f"{config.seed}"
    )
    with StopRequest() as request, naming_failures(run.path):
        compile_and_capture(run, trainer, console, request)
        run.write_config(trainer.config)
        sinks = (JsonLines(run.metrics, trainer.epoch), tensorboard := TensorBoard(run.path, trainer.epoch), console)
        console.begin(trainer.steps_done, trainer.total_steps, config.batch_size)
        try:
            with ExitStack() as at_the_end:
                for sink in sinks:
                    at_the_end.callback(sink.close)
                epochs(run, trainer, sinks, console, request)
                accuracies = {
                    name: evaluation.accuracy for name, evaluation in trainer.evaluate(test, trainer.chosen()).items()
                }
                tensorboard.final(config.epochs, accuracies)
            result = conclude(run, trainer, accuracies)
            run.write_result(result)
        finally:
            draw_curves(run, console)
    console.summary(result, run.path)
    return result


@contextmanager
def naming_failures(run: Path | None = None) -> Iterator[None]:
    """Has a GPU that runs out of memory, or fails, end in a sentence that says how to go on with `run`, if there is
    one yet.
    """
    command = f"fastcifar train --resume {shlex.quote(str(run))}" if run else "the same command"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FastcifarError(
            f"the GPU's memory ran out ({reason(error)}); close what else uses the card and go on with {command}, or "
            "start anew with a "
            "smaller --batch-size, or with --micro-batch, which splits the batches."
        ) from error
    except torch.AcceleratorError as error:
        raise FastcifarError(
            f"the GPU failed ({reason(error)}); what was saved is whole: go on with {command}, or ask fastcifar "
            "doctor if that fails too."
        ) from error


def compile_and_capture(run: Run, trainer: Trainer, console: Console, request: StopRequest) -> None:
    """Readies the step. Raises Interrupted where `request` was made meanwhile."""
    asked = trainer.config.engine
    try:
        with request.answered_at_once():
            message = trainer.compile(lambda: console.wait("Compiling, which takes a minute or two the first time."))
            console.note(message, prominent=asked.compile == "on" and trainer.config.engine.compile == "off")
            if captured := trainer.capture():
                console.note(captured, prominent=asked.capture == "on" and trainer.config.engine.capture == "off")
    except KeyboardInterrupt:
        console.stop_waiting()
        raise Interrupted(request.signal_number or signal.SIGINT, run.path) from None


def draw_curves(run: Run, console: Console) -> None:
    """Draws curves.png anew, once there is an epoch."""
    if os.path.exists(run.metrics) and run.metrics.stat().st_size:
        line = draw(run.path / "curves.png", plot_run, run)
        if line:
            console.note(line)


def epochs(run: Run, trainer: Trainer, sinks: tuple[Sink, ...], console: Console, request: StopRequest) -> None:
    """The epochs that remain. Raises Interrupted, with the state saved, where `request` was made."""
    total, saved, cost = trainer.config.epochs, trainer.elapsed, 0.0

    def tick(batch: int) -> None:
        loss, accuracy = trainer.running or (None, None)
        console.tick(trainer.steps_done, trainer.epoch + 1, total, trainer.lr[trainer.steps_done - 1], loss, accuracy)

    while trainer.epoch < total:
        ended = trainer.run_epoch(lambda: request.signal_number is not None, tick)
        totals = trainer.meter.read()
        trainer.check_finite(totals)
        if ended:
            record = trainer.end_epoch(totals)
            for sink in sinks:
                sink.write(record)
        elapsed = trainer.elapsed
        stopping = request.signal_number is not None
        if stopping or trainer.epoch == total or cost <= CHECKPOINT_SHARE * (elapsed - saved):
            start = time.perf_counter()
            checkpoints.save(run.checkpoints, snapshot.take(trainer))
            saved, cost = elapsed, time.perf_counter() - start
        if stopping and trainer.epoch < total:
            raise Interrupted(request.signal_number, run.path)


def conclude(run: Run, trainer: Trainer, accuracies: dict[str, float]) -> Result:
    """The result of a run that has ended, given the test accuracies of its weights by name."""
    config = trainer.config
    averaged = {name: accuracy for name, accuracy in accuracies.items() if name != WEIGHTS}
    return Result(
        test_accuracy=accuracies[WEIGHTS],
        validation_accuracy=trainer.best[WEIGHTS].score["accuracy"] if WEIGHTS in trainer.best else None,
        averaged_test_accuracy=next(iter(averaged.values()), None),
        averaged_test_accuracies=averaged,
        chosen_epochs={name: best.score["epoch"] for name, best in trainer.best.items()},
        watched_test_accuracy=highest_test_accuracy(read_records(run.metrics)),
        images_per_second=trainer.images_per_second,
        seconds=trainer.elapsed,
        seconds_by_phase={
            "data": trainer.seconds["read"] + trainer.seconds["load"],
            **{phase: trainer.seconds[phase] for phase in ("compile", "train", "evaluate")},
        },
        flop_utilization=flop_utilization(trainer),
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        parameters=trainer.count.parameters,
        recipe=config.recipe,
        device=device_name(trainer.device),
        versions=versions(),
        commit=commit(),
    )


def flop_utilization(trainer: Trainer) -> float | None:
    """The rate of training over that of a large matrix product; None where no memory is left for the matrices, which
    costs no result.
    """
    try:
        possible = matmul_flops_per_second(trainer.device, trainer.precision.dtype)
    except torch.OutOfMemoryError:
        return None
    return trainer.images_per_second * trainer.count.training_flops / possible


def highest_test_accuracy(records: list[EpochRecord]) -> float | None:
    """The highest of any epoch and weights, where the test set was watched."""
    watched = [record for record in records if record.test_accuracy is not None]
    return max(
        (max(record.test_accuracy, *record.averaged_test_accuracies.values(), 0.0) for record in watched), default=None
    )


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    packages = ("fastcifar", "torch", "triton", "nvidia-dali-cuda130", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit that the package's own checkout stands at, marked -dirty where its files differ."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
