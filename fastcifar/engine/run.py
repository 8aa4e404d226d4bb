"""From a configuration to a finished run folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from fastcifar.analysis.plots import plot_curves
from fastcifar.config import EngineConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.data.splits import validation_split
from fastcifar.engine import snapshot
from fastcifar.engine.graph import keep_artefacts
from fastcifar.engine.host import device_name, keep_freed_memory, matmul_flops_per_second, peak_memory_bytes, resolve_device
from fastcifar.engine.memory import DataSize, fit_to_memory, limit_memory
from fastcifar.engine.precision import DTYPES
from fastcifar.engine.resolve import resolve
from fastcifar.engine.trainer import Trainer
from fastcifar.models.count import count_network
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import WEIGHTS
from fastcifar.runs.console import Console, Silence
from fastcifar.runs.files import writing
from fastcifar.runs.folder import Result, Run, check_free
from fastcifar.runs.interrupt import Interrupted, StopRequest
from fastcifar.runs.records import EpochRecord, JsonLines, Sink, TensorBoard, read_records

CHECKPOINT_SHARE = 0.02
"""Most of the time that may go into checkpoints; large networks write hundreds of megabytes, and skip epochs for it."""


def train(config: RunConfig, out: str | Path | None = None, *, console: Console | None = None) -> Result:
    """Trains as `config` says, in a new run folder.

    Args:
        config: the whole configuration.
        out: folder of the run, new or empty; `./runs/NAME-TIME` by default.
        console: where to show progress; nowhere by default.

    Raises:
        FastcifarError: something asked for is not there or cannot be done; nothing is left half-written.
        Interrupted: the run was stopped by a signal, and saved.
    """
    console = console or Silence()
    began = time.perf_counter()
    if out is not None:
        check_free(Path(out))
    config, notes = resolve(config)
    trainer, test = build_trainer(config, began)
    run = Run.create(Path(out) if out else None, trainer.config)
    if trainer.memory and (config.engine.memory_limit or trainer.memory.passes > 1):
        notes.append(str(trainer.memory))
    for note in notes:
        console.note(note, prominent=True)
    return carry_out(run, trainer, test, console)


def resume(path: str | Path, *, console: Console | None = None) -> Result:
    """Goes on with the run in the folder `path` from its last checkpoint, with the choices stored there. Raises as `train`."""
    console, began = console or Silence(), time.perf_counter()
    run = Run.open(Path(path))
    finished = run.result()
    if finished is not None:
        console.note(f"{run.path} has ended already.")
        return finished
    trainer, test = build_trainer(run.config(), began)
    state = checkpoints.load(run.checkpoints)
    if state is not None:
        snapshot.restore(trainer, state)
    console.note(f"Going on with {run.path} after epoch {trainer.epoch} of {trainer.config.epochs}.")
    return carry_out(run, trainer, test, console)


def build_trainer(config: RunConfig, began: float) -> tuple[Trainer, ImageSet]:
    """The trainer of a resolved configuration, laid out for the memory there is, and the test images."""
    prepare_machine(config.engine)
    full = load_dataset(config.data.dataset, "train", config.data.data_dir)
    test = load_dataset(config.data.dataset, "test", config.data.data_dir)
    size = DataSize(len(full), len(test), len(full.classes), full.images.shape[1])
    config, plan = fit_to_memory(config, size, torch.device(config.engine.device), DTYPES[config.engine.precision].itemsize)
    training, validation = full, None
    if config.data.val_split:
        kept, apart = validation_split(full.labels, config.data.val_split, config.data.split_seed, len(full.classes))
        training, validation = full.subset(kept), full.subset(apart)
    return Trainer(config, training, validation, test if config.watch_test else None, began, plan), test


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
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = engine.precision != "fp32"
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(engine.deterministic)


def carry_out(run: Run, trainer: Trainer, test: ImageSet, console: Console) -> Result:
    """Trains to the end, keeping the folder in step, and writes the result."""
    config = trainer.config
    console.note(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on {config.data.dataset} "
        f"({len(trainer.loader.dataset):,} images), {device_name(trainer.device)}, {trainer.precision.name}, seed {config.seed}"
    )
    with StopRequest() as request:
        message = trainer.compile()
        console.note(message, prominent=config.engine.compile == "on" and trainer.config.engine.compile == "off")
        if captured := trainer.capture():
            console.note(captured)
        run.write_config(trainer.config)
        sinks = (console, JsonLines(run.metrics, trainer.epoch), tensorboard := TensorBoard(run.path, trainer.epoch))
        console.begin(trainer.steps_done, trainer.total_steps, config.batch_size)
        with ExitStack() as at_the_end:
            at_the_end.callback(draw_curves, run)
            for sink in sinks:
                at_the_end.callback(sink.close)
            epochs(run, trainer, sinks, console, request)
            accuracies = {name: evaluation.accuracy for name, evaluation in trainer.evaluate(test, trainer.chosen()).items()}
            tensorboard.final(config.epochs, accuracies)
    result = conclude(run, trainer, accuracies)
    run.write_result(result)
    console.summary(result, run.path)
    return result


def draw_curves(run: Run) -> None:
    """Draws curves.png anew. Raises FastcifarError where that cannot be written."""
    path = run.path / "curves.png"
    with writing(path):
        plot_curves(read_records(run.metrics), path)


def epochs(run: Run, trainer: Trainer, sinks: tuple[Sink, ...], console: Console, request: StopRequest) -> None:
    """The epochs that remain. Raises Interrupted, with the state saved, where `request` was made."""
    total, saved, cost = trainer.config.epochs, trainer.elapsed, 0.0

    def tick(batch: int) -> None:
        console.tick(trainer.steps_done, trainer.epoch + 1, total, trainer.lr[trainer.steps_done - 1])

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
    count = count_network(config.model.arch, **trainer.network["options"])
    peak_rate = matmul_flops_per_second(trainer.device, trainer.precision.dtype)
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
        flop_utilization=trainer.images_per_second * count.training_flops / peak_rate,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        parameters=count.parameters,
        recipe=config.recipe,
        device=device_name(trainer.device),
        versions=versions(),
        commit=commit(),
    )


def highest_test_accuracy(records: list[EpochRecord]) -> float | None:
    """Of any epoch and weights, where the test set was watched."""
    watched = [record for record in records if record.test_accuracy is not None]
    return max((max(record.test_accuracy, *record.averaged_test_accuracies.values(), 0.0) for record in watched), default=None)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
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
