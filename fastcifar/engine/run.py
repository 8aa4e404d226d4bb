"""Trains from a configuration to a finished run folder, and resumes runs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastcifar.config import ModelConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.device import device_name, matmul_flops_per_second, peak_memory_bytes
from fastcifar.engine.compile import Obstacle, Why
from fastcifar.engine.memory import plan_in_words
from fastcifar.engine.setup import Images, build_trainer, open_images, resolve
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError, is_memory_error, reason
from fastcifar.models import GIVEN, check_trusted
from fastcifar.optim.course import Duration
from fastcifar.optim.schedules import in_steps, lr_table
from fastcifar.plots import draw, plot_run
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.checkpoint import WEIGHTS
from fastcifar.runs.console import Console, notebook_console
from fastcifar.runs.folder import Result, Run, check_free
from fastcifar.runs.interrupt import Interrupted, StopRequest
from fastcifar.runs.provenance import commit, versions
from fastcifar.runs.records import EpochRecord, JsonLines, Sink, TensorBoard, read_records

CHECKPOINT_SHARE = 0.02
"""Largest share of the time that may go into checkpoints; large networks skip epochs to stay below it."""


def train(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    train_set: ImageSet | None = None,
    test_set: ImageSet | None = None,
    console: Console | None = None,
    trust: bool = False,
) -> Result:
    """Trains as `config` says, in a new run folder; the other arguments are those of `fastcifar.train`.

    Raises FastcifarError where something asked for is missing or cannot be done, with nothing left half-written;
    Interrupted where a signal stopped the run, which was saved.
    """
    console, began = console or notebook_console(), time.perf_counter()
    if out is not None:
        check_free(Path(out))
    if model is not None:
        config = replace(config, model=ModelConfig(GIVEN, max_params=config.model.max_params))
    if train_set is not None:
        config = replace(config, data=replace(config.data, dataset=GIVEN))
    config, notes = resolve(config)
    images = open_images(config, train_set, test_set)
    with naming_failures():
        trainer = build_trainer(config, began, images, model, trust)
    trainer.state.images = digests(images)
    run = Run.create(Path(out) if out else None, trainer.config)
    with run.locked():
        if trainer.memory and (config.engine.memory_limit or trainer.memory.passes > 1):
            notes.append(plan_in_words(trainer.memory))
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
    trust: bool = False,
) -> Result:
    """Resumes the run in the folder `path` from its last checkpoint, with the choices stored there.

    Args:
        epochs: the number of epochs in all, more than the run was made for; the run may have ended already.
        model, train_set, test_set: what was given to `train`, given again.
        console: where to show progress; by default only a notebook shows it.
        trust: whether an architecture of the run's own code (`package.module:function`) may be imported.

    Raises:
        FastcifarError: as `train`; or the checkpoint is damaged, or `epochs` does not exceed the run's.
        Interrupted: a signal stopped the run, which was saved.
    """
    console, began, run = console or notebook_console(), time.perf_counter(), Run.open(Path(path))
    with run.locked():
        run.sweep()
        checkpoints.sweep(run.checkpoints)
        finished, stored = run.result(), run.config()
        if finished is not None and epochs is None:
            console.note(f"{run.path} has ended already; --epochs beyond its {stored.epochs} would make it go on.")
            return finished
        if model is None:
            check_trusted(stored.model.arch, run.path, trust)
        images = open_images(stored, train_set, test_set)
        config = stored if epochs is None else lengthened(stored, epochs, images.steps_per_epoch(stored), run.path)
        with naming_failures():
            trainer = build_trainer(config, began, images, model, trust)
            trainer.state.images = digests(images)
            if checkpoint := checkpoints.load(run.checkpoints):
                known = checkpoint.progress.get("images", {})
                check_images(run.path, known, trainer.state.images, console)
                trainer.state.restore(checkpoint)
        console.note(f"Going on with {run.path} after epoch {trainer.state.epoch} of {config.epochs}.")
        if epochs is not None:
            console.note(change_of_rate(stored, trainer), prominent=True)
            run.set_aside_result(stored.epochs)
        return carry_out(run, trainer, images.test, console)


def digests(images: Images) -> dict[str, str]:
    return {"train": images.train.digest(), "test": images.test.digest()}


def check_images(run: Path, known: dict[str, str], given: dict[str, str], console: Console) -> None:
    """Raises FastcifarError where the digests `given` are not those that the run's checkpoint holds, `known`."""
    if not known:
        line = "is of an earlier version, without digests: damage to it, and other images than its own, go unnoticed."
        console.note(f"{run} {line}", prominent=True)
    elif bad := [split for split, digest in given.items() if known.get(split) != digest]:
        raise FastcifarError(f"the {bad[0]} images are others than those of {run}; bring those back, or train anew.")


def lengthened(config: RunConfig, epochs: int, steps_per_epoch: int, path: Path) -> RunConfig:
    """Extends `config` to more epochs without changing what was done: shares of the run become lengths in steps.

    Only a schedule that ends with the run still does. Raises ConfigError where there are not more epochs.
    """
    if epochs <= config.epochs:
        raise ConfigError(f"{path} is a run of {config.epochs} epochs; give more with --epochs, or leave it out.")
    total = steps_per_epoch * config.epochs
    schedule, start = in_steps(config.schedule, steps_per_epoch, config.epochs), config.average.swa_start
    swa_start = start and f"{Duration.parse(start).steps(steps_per_epoch, total)}st"
    return replace(config, epochs=epochs, schedule=schedule, average=replace(config.average, swa_start=swa_start))


def change_of_rate(stored: RunConfig, trainer: Trainer) -> str:
    done, config = trainer.state.steps_done, trainer.config
    before = lr_table(stored.schedule, stored.optim.peak_lr(stored.batch_size), trainer.steps_per_epoch, stored.epochs)
    was = f"would have gone on at {before[done]:.4g}" if done < len(before) else f"had come to {before[-1]:.4g}"
    return (
        f"{config.epochs} epochs in place of {stored.epochs}: {config.schedule.schedule} is laid out for all of them, "
        f"so the learning rate goes on at {trainer.state.scheduled_lr[done]:.4g}, where it {was}."
    )


def carry_out(run: Run, trainer: Trainer, test: ImageSet, console: Console) -> Result:
    """Trains to the end, keeps the folder up to date, and writes the result."""
    config, state = trainer.config, trainer.state
    console.note(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters, on "
        f"{config.data.dataset} ({len(trainer.loader.dataset):,} images), {device_name(trainer.device)}, "
        f"{trainer.precision.name}, seed {config.seed}"
    )
    with StopRequest() as request, naming_failures(run.path), closing(console):
        with request.answered_at_once(run.path):
            resolved = compile_and_capture(trainer, console)
        run.write_config(resolved)
        lines = JsonLines(run.metrics, state.epoch)
        sinks = (lines, tensorboard := TensorBoard(run.path, lines.kept, console.note))
        console.begin(state.steps_done, state.total_steps, config.batch_size)
        try:
            with ExitStack() as at_the_end:
                for sink in sinks:
                    at_the_end.callback(sink.close)
                train_epochs(run, trainer, sinks, console, request)
                evaluations = trainer.evaluate(test, state.chosen())
                accuracies = {name: evaluation.accuracy for name, evaluation in evaluations.items()}
                tensorboard.final(config.epochs, accuracies)
            result = conclude(run, trainer, accuracies, evaluations[WEIGHTS].loss)
            run.write_result(result)
        finally:
            draw_curves(run, console)
    console.summary(result, run.path)
    return result


def train_epochs(run: Run, trainer: Trainer, sinks: tuple[Sink, ...], console: Console, request: StopRequest) -> None:
    """Trains for the remaining epochs. Raises Interrupted, with the state saved, where `request` was made."""
    state, total = trainer.state, trainer.config.epochs
    saved, cost = trainer.clock.elapsed, 0.0

    def tick(batch: int) -> None:
        loss, accuracy = trainer.running or (None, None)
        console.tick(state.steps_done, state.epoch + 1, total, state.lr[state.steps_done - 1], loss, accuracy)

    while state.epoch < total:
        ended = trainer.run_epoch(lambda: request.signal_number is not None, tick)
        totals = trainer.read_totals()
        record = trainer.end_epoch(totals) if ended else None
        if record:
            run.check_there()
            for sink in sinks:
                sink.write(record)
        elapsed, signal_number = trainer.clock.elapsed, request.signal_number
        if signal_number is not None or state.epoch == total or cost <= CHECKPOINT_SHARE * (elapsed - saved):
            start = time.perf_counter()
            checkpoints.save(run.checkpoints, state.checkpoint())
            saved, cost = elapsed, time.perf_counter() - start
        if record:
            console.write(record)
        if signal_number is not None and state.epoch < total:
            raise Interrupted(signal_number, run.path)


@contextmanager
def naming_failures(run: Path | None = None) -> Iterator[None]:
    """Turns a lack of memory or a GPU's failure into a FastcifarError that says how to continue `run`, if it exists."""
    command = f"fastcifar train --resume {shlex.quote(str(run))}" if run else "the same command"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FastcifarError(
            f"the GPU's memory ran out ({reason(error)}); close what else uses the card and go on with {command}, or "
            "start anew with a smaller --batch-size, or with --micro-batch, which splits the batches."
        ) from error
    except torch.AcceleratorError as error:
        raise FastcifarError(
            f"the GPU failed ({reason(error)}); what was saved is whole: go on with {command}, or ask fastcifar "
            "doctor if that fails too."
        ) from error
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_memory_error(error):
            raise
        raise FastcifarError(
            f"the main memory ran out ({reason(error)}); close other programs and go on with {command}, or start anew "
            "with a smaller --batch-size, or with --micro-batch, which splits the batches."
        ) from error


NOT_COMPILED = {
    Why.ASKED: "Not compiled, as asked.",
    Why.NO_STEP_LEFT: "Not compiled: no step is left to run.",
    Why.DOES_NOT_PAY: "Not compiled: {0.training_seconds:.0f} s of training would not win back the "
    "{0.compile_seconds:.0f} s.",
    Why.FAILED: "Not compiled: torch.compile failed ({0.detail}); training goes on without it.",
}
NOT_CAPTURED = {
    Why.ASKED: "as asked",
    Why.SHORT_RUN: "since the run is shorter than the warm-up",
    Why.OVERFLOW_CHECK: "since {0.detail} in float16 waits to know whether the gradient overflowed",
    Why.FAILED: "since that failed ({0.detail})",
}


def compile_and_capture(trainer: Trainer, console: Console) -> RunConfig:
    """Compiles and captures the step, and reports the outcome; returns the configuration with these choices made."""
    config, asked = trainer.config, trainer.config.engine
    outcome = trainer.compile(lambda: console.wait("Compiling, which takes a minute or two the first time."))
    if isinstance(outcome, Obstacle):
        # A run that has ended says nothing of the choice that it was made with.
        kept = asked.compile == "on" and outcome.why == Why.NO_STEP_LEFT
        engine = replace(asked, compile="on" if kept else "off")
        line = NOT_COMPILED[outcome.why].format(outcome)
    else:
        engine, line = replace(asked, compile="on"), f"Compiled in {outcome:.1f} s."
    console.note(line, prominent=asked.compile == "on" and engine.compile == "off")
    if trainer.device.type == "cuda":
        outcome = trainer.capture()
        if isinstance(outcome, Obstacle):
            engine = replace(engine, capture="off")
            line = f"Not captured, {NOT_CAPTURED[outcome.why].format(outcome)}; the host launches every kernel."
        else:
            engine, line = replace(engine, capture="on"), f"Captured, {outcome} steps a launch."
        console.note(line, prominent=asked.capture == "on" and engine.capture == "off")
    return replace(config, engine=engine)


def draw_curves(run: Run, console: Console) -> None:
    if os.path.exists(run.metrics) and run.metrics.stat().st_size:
        line = draw(run.path / "curves.png", plot_run, run)
        if line:
            console.note(line)


def conclude(run: Run, trainer: Trainer, accuracies: dict[str, float], test_loss: float) -> Result:
    config, best, seconds = trainer.config, trainer.state.best, trainer.clock.seconds
    averaged = {name: accuracy for name, accuracy in accuracies.items() if name != WEIGHTS}
    return Result(
        test_accuracy=accuracies[WEIGHTS],
        validation_accuracy=best[WEIGHTS].score["accuracy"] if WEIGHTS in best else None,
        averaged_test_accuracy=next(iter(averaged.values()), None),
        averaged_test_accuracies=averaged,
        chosen_epochs={name: found.score["epoch"] for name, found in best.items()},
        watched_test_accuracy=highest_test_accuracy(read_records(run.metrics)),
        images_per_second=trainer.images_per_second,
        seconds=trainer.clock.elapsed,
        seconds_by_phase={
            "data": seconds["read"] + seconds["load"],
            **{phase: seconds[phase] for phase in ("compile", "train", "evaluate")},
        },
        flop_utilization=flop_utilization(trainer),
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        parameters=trainer.count.parameters,
        recipe=config.recipe,
        device=device_name(trainer.device),
        versions=versions(),
        commit=commit(),
        test_loss=test_loss,
        validation_loss=best[WEIGHTS].score["loss"] if WEIGHTS in best else None,
    )


def flop_utilization(trainer: Trainer) -> float | None:
    """Returns the FLOP rate of training over that of a large matrix product; None where memory is short for it."""
    try:
        possible = matmul_flops_per_second(trainer.device, trainer.precision.dtype)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        return None
    return trainer.images_per_second * trainer.count.training_flops / possible


def highest_test_accuracy(records: list[EpochRecord]) -> float | None:
    """Returns the highest test accuracy of the weights in any epoch; None where the test set was not watched."""
    return max((record.test_accuracy for record in records if record.test_accuracy is not None), default=None)
