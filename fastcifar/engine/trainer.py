"""A run from its configuration to its result."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization
from fastcifar.augment.random import Key, Stream, epoch_seed
from fastcifar.config import RunConfig, ScheduleConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.device import Precision, random_state_of, set_random_state, synchronize
from fastcifar.engine import snapshot
from fastcifar.engine.compile import (
    CPU_OPTIONS,
    CapturedSteps,
    Compiled,
    Recorder,
    capture_obstacle,
    compile_function,
    mark_of,
    obstacle_to_compiling,
    timed,
)
from fastcifar.engine.evaluate import Evaluation, Evaluator
from fastcifar.engine.memory import MemoryPlan
from fastcifar.engine.objective import Objective, Outcome
from fastcifar.engine.shadow import Shadow, shadow_dtype
from fastcifar.engine.snapshot import BestWeights
from fastcifar.engine.step import (
    Average,
    Backward,
    Clip,
    DeviceBook,
    Forward,
    LiveMeter,
    Meter,
    Part,
    SlicedPass,
    Step,
    Totals,
    Update,
    Workspace,
)
from fastcifar.errors import ConfigError, FastcifarError, reason
from fastcifar.models import GIVEN, build_model, check_parameters
from fastcifar.models.count import NetworkCount, count_model, count_network
from fastcifar.optim.averaging import SWA, Averages, Buckets, Flat
from fastcifar.optim.optimizers import build_optimizer
from fastcifar.optim.schedules import Plateau, cycle_ends, lr_table
from fastcifar.optim.sharpness import Ascend, Return
from fastcifar.runs.checkpoint import WEIGHTS, Best
from fastcifar.runs.records import EpochRecord

SMALL_STEP_FLOPS = 1e11
"""A large GPU takes a fraction of a millisecond for fewer, so that several steps are one launch."""


class Trainer:
    """Model, optimiser and data of a run, and the loop over its epochs.

    Args:
        config: with its choices made (`engine.resolve`), but for compiling.
        train: the training images.
        validation: images set apart, or None.
        watched: the test images, where they are to be evaluated every epoch, or None.
        began: `time.perf_counter()` when the run, or its resumption, began.
        memory: how the run is laid out for the memory there is, where that was looked at.
        model: the network, in place of one built by the name in `config`; it is trained itself, not a copy.
    """

    def __init__(
        self,
        config: RunConfig,
        train: ImageSet,
        validation: ImageSet | None = None,
        watched: ImageSet | None = None,
        began: float | None = None,
        memory: MemoryPlan | None = None,
        model: nn.Module | None = None,
    ) -> None:
        now = time.perf_counter()
        self.began = now if began is None else began
        self.earlier = 0.0
        """Seconds before the last resumption."""
        self.config, self.device, self.memory = config, torch.device(config.engine.device), memory
        self.precision = Precision(config.engine.precision)
        self.loader = build_loader(config, train)
        self.normalization: Normalization = self.loader.normalization
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validation, self.watched = (part and part.to(self.device) for part in (validation, watched))
        torch.manual_seed(config.seed)
        options = {"classes": len(train.classes), "image_size": train.images.shape[1], **config.model.options}
        model = build_model(config.model.arch, **options) if model is None else model
        check_parameters(sum(parameter.numel() for parameter in model.parameters()), config.model.max_params)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.buckets = Buckets(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        self.averages = Averages(self.buckets, config.average, self.steps_per_epoch, config.epochs)
        self.best: dict[str, BestWeights] = {}
        """By name of the weights; empty without a validation split."""
        ends = cycle_ends(config.schedule, self.steps_per_epoch, config.epochs) if config.schedule.snapshots else ()
        self.cycle_ends = {end: f"snapshot-{number}" for number, end in enumerate(ends, start=1)}
        """Names of the snapshots, by the steps that are done then."""
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        """Those there are so far, on the CPU."""
        self.lr = lr_table(
            config.schedule, config.optim.peak_lr(config.batch_size), self.steps_per_epoch, config.epochs
        )
        self.captured: CapturedSteps | None = None
        self.unscaled_lr = tuple(self.lr)
        self.plateau = build_plateau(config.schedule)
        self.meter = Meter(self.device)
        on_gpu = self.device.type == "cuda"
        self.book = DeviceBook(self.meter, self.optimizer, self.lr, self.averages.decays) if on_gpu else None
        self.live_meter = LiveMeter(self.meter)
        self.running: tuple[float, float] | None = None
        """Loss and accuracy of this epoch, as of some steps ago."""
        self.epoch, self.batch = 0, 0
        self.seconds: Counter[str] = Counter(read=now - self.began, load=0.0, compile=0.0, train=0.0, evaluate=0.0)
        """By phase; `read` is of the whole data set, `load` the waiting for batches."""
        self.network = {
            "arch": config.model.arch,
            "options": options,
            "classes": train.classes,
            **asdict(self.normalization),
        }
        self.shadow = Shadow(
            self.model, self.buckets.flat[0], shadow_dtype(config.model.arch, self.device, self.precision.dtype)
        )
        context = self.precision, config.loss, self.device, train.classes
        self.objective = Objective(self.model, self.normalization, *context, self.shadow.weights)
        self.evaluator = Evaluator(
            self.model, self.normalization, self.precision, self.device, memory and memory.evaluation_batch
        )
        self.step = self.build_step(self.objective)

    @cached_property
    def count(self) -> NetworkCount:
        """Parameters and FLOPs of the network."""
        if self.config.model.arch == GIVEN:
            return count_model(copy.deepcopy(self.model).cpu(), self.network["options"]["image_size"])
        return count_network(self.config.model.arch, **self.network["options"])

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.batch

    def build_step(self, objective: Callable[[Tensor, Tensor], Outcome]) -> Step:
        """The parts of a step, in order."""
        optim = self.config.optim.resolved
        gradient: list[Part] = [Forward(objective, self.shadow), Backward(self.scaler, self.shadow)]
        if self.pass_size < self.config.batch_size:
            gradient = [SlicedPass(objective, self.scaler, self.shadow, self.pass_size)]
        parts = list(gradient)
        if optim.sharpness != "none":
            ascend = Ascend(self.model, self.buckets, optim)
            parts += [ascend, *gradient, Return(ascend)]
        parts += [Clip(self.optimizer, self.scaler, optim.clip_norm)] if optim.clip_norm else []
        parts += [Update(self.optimizer, self.scaler, self.lr)]
        parts += [Average(self.averages, self.book and self.book.decays)] if self.config.average.decays else []
        return Step((*parts, self.book or self.meter))

    def compile(self, announce: Callable[[], None] = lambda: None) -> str:
        """Compiles the forward and backward pass where that pays; the choice goes into `config`, a line about it is
        returned.

        What takes long is announced.
        """
        requested, remaining = self.config.engine.compile, self.total_steps - self.steps_done
        options = CPU_OPTIONS if self.device.type == "cpu" else None
        mark = mark_of(self.config, self.device, options)
        with self.clock("compile"):
            obstacle = obstacle_to_compiling(
                requested, remaining, self.eager_step_seconds, self.device.type, mark.exists()
            )
            if obstacle:
                outcome = Compiled(self.objective, not remaining and requested == "on", obstacle)
            else:
                announce()
                outcome = compile_function(self.objective, self.rehearse, mark, options)
        if outcome.compiled:
            self.step, self.captured = self.build_step(outcome.function), None
        self.config = replace(
            self.config, engine=replace(self.config.engine, compile="on" if outcome.compiled else "off")
        )
        return outcome.message

    def eager_step_seconds(self) -> float:
        """Seconds that a step takes which is not compiled, but captured where it can be, since launching would count
        the host's time.
        """
        if self.obstacle_to_capture() or self.try_capture():
            return min([timed(self.rehearse, self.objective) for _ in range(4)][1:])

        def replay() -> None:
            self.captured.all()
            synchronize(self.device)

        with self.leaving_no_trace():
            return min([timed(replay) for _ in range(4)][1:]) / self.captured.count

    @property
    def pass_size(self) -> int:
        """Images that go through the network at once."""
        return min(self.config.engine.micro_batch or self.config.batch_size, self.config.batch_size)

    def blank_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """So many black images and their labels, of the shapes and types of every batch."""
        size = self.loader.dataset.images.shape[1:3]
        images = torch.zeros(count, *size, 3, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        return images, F.one_hot(labels, len(self.loader.dataset.classes)).float() if self.loader.policy.mix else labels

    def capture(self) -> str | None:
        """Records the step as CUDA graphs where that is asked for and possible; returns a line about it, or None on
        a CPU.
        """
        if self.book is None:
            return None
        obstacle = self.obstacle_to_capture()
        if obstacle is None and self.captured is None:
            with self.clock("compile"):
                obstacle = self.try_capture()
        choice = "off" if obstacle else "on"
        self.config = replace(self.config, engine=replace(self.config.engine, capture=choice))
        return (
            f"Not captured, {obstacle}; the host launches every kernel."
            if obstacle
            else f"Captured, {self.captured.count} steps a launch."
        )

    def obstacle_to_capture(self) -> str | None:
        """Why the step is launched kernel by kernel, as far as is known without trying to capture it."""
        if self.book is None or self.config.engine.capture == "off":
            return "as asked"
        return capture_obstacle(self.optimizer, self.scaler, self.total_steps)

    def try_capture(self) -> str | None:
        """Warms up and records; weights and state come out as they went in. Returns why it failed, if it did.

        Raises FastcifarError where CUDA itself reports an error, after which nothing on the device is to be trusted.
        """
        try:
            with self.leaving_no_trace():
                return self.record_steps()
        except torch.AcceleratorError as error:
            raise FastcifarError(
                f"recording a step as a CUDA graph failed ({reason(error)}); try --capture off, which launches every "
                "kernel by itself."
            ) from error

    def record_steps(self) -> str | None:
        """Records steps and evaluations, for which it takes a few steps. Returns why it failed, but raises CUDA's
        own errors.
        """
        try:
            images, labels = self.blank_batch(self.config.batch_size)
            steps = 8 if self.config.batch_size * self.count.training_flops < SMALL_STEP_FLOPS else 1
            recorder = Recorder(self.device)
            recorder.warm_up(lambda: self.step(Workspace(None, images, labels)))
            self.captured = CapturedSteps(self.step, images, labels, steps, recorder)
            self.evaluator.capture(images.shape[2:], recorder)
            return None
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self.captured = None
            return f"since that failed ({reason(error)})"

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """After the block weights and state are what they were before it, unless CUDA itself has failed."""
        kept, earlier, seconds = snapshot.take(self), self.earlier, self.seconds.copy()
        kept = replace(kept, state={name: tensor.clone() for name, tensor in kept.state.items()})
        lost = False
        try:
            yield
        except torch.AcceleratorError:
            lost = True
            raise
        finally:
            if not lost:
                self.optimizer.zero_grad(set_to_none=True)
                self.shadow.drop()
                snapshot.restore(self, kept)
                self.earlier, self.seconds = earlier, seconds

    def rehearse(self, objective: Callable[[Tensor, Tensor], Outcome]) -> None:
        """One forward and backward pass that leaves weights, buffers and random state as they were."""
        kept, random_state = self.buckets.flat[1].clone(), random_state_of(self.device)
        try:
            objective(*self.blank_batch(self.pass_size)).loss.backward()
            synchronize(self.device)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.shadow.drop()
            self.buckets.flat[1].copy_(kept)
            set_random_state(self.device, random_state)

    def run_epoch(self, stop: Callable[[], bool], tick: Callable[[int], None]) -> bool:
        """Trains to the end of the epoch, from where it stands; False where `stop` said so before."""
        if self.batch == 0:
            self.meter.reset()
            torch.manual_seed(epoch_seed(Key(self.config.seed, self.epoch), Stream.DROPOUT))
        self.model.train()
        self.live_meter.forget()
        batches, self.running = self.loader.batches(self.epoch, self.batch), None
        while True:
            with self.clock("load"):
                batch = next(batches, None)
            if batch is None:
                break
            with self.clock("train"):
                self.launch(*batch)
            self.batch += 1
            if self.steps_done in self.cycle_ends:
                self.keep_snapshot()
            self.read_live()
            tick(self.batch)
            if stop() and self.batch < self.steps_per_epoch:
                self.finish_steps()
                return False
        with self.clock("train"):
            self.finish_steps()
            synchronize(self.device)
        self.epoch, self.batch = self.epoch + 1, 0
        return True

    def read_live(self) -> None:
        """Takes in how the epoch goes, where that is known without waiting. Raises FastcifarError where a loss was
        not finite.
        """
        launched = self.batch - (self.captured.filled if self.captured else 0)
        reading = self.live_meter(self.batch, launched)
        if reading is not None:
            self.check_finite(reading.totals)
            images = reading.steps * self.config.batch_size
            self.running = reading.totals.loss / images, reading.totals.correct / images

    def launch(self, images: Tensor, labels: Tensor) -> None:
        """A step, at once or with those after it."""
        if self.captured:
            self.captured(images, labels)
        else:
            self.step(Workspace(None if self.book else self.steps_done, images, labels))

    def finish_steps(self) -> None:
        """Launches the steps that wait for others."""
        if self.captured:
            self.captured.flush()

    def keep_snapshot(self) -> None:
        """Keeps the weights of this step, with the batch norm statistics that they have: Huang et al. 2017,
        arXiv:1704.00109.
        """
        with self.clock("train"):  # which is waited for
            self.finish_steps()
            kept = snapshot.named(self, self.buckets.flat)
            self.snapshots[self.cycle_ends[self.steps_done]] = {name: tensor.cpu() for name, tensor in kept.items()}

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `seconds[phase]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, without the time between an end and a resumption."""
        return self.earlier + time.perf_counter() - self.began

    def check_finite(self, totals: Totals) -> None:
        """Raises FastcifarError where the loss of a step since the epoch began was not finite."""
        bad = totals.first_bad_step
        if bad is not None:
            raise FastcifarError(
                f"the loss became infinite or NaN at step {bad} of {self.total_steps} (epoch "
                f"{bad // self.steps_per_epoch + 1}, "
                f"lr {self.lr[bad]:.4g}); lower --lr, lengthen --warmup, or bound the gradient with --clip-norm 1."
            )

    def last(self) -> dict[str, Flat]:
        """The weights as they are, and their averages, by name."""
        return {WEIGHTS: self.buckets.flat, **self.averages.flat}

    def chosen(self) -> dict[str, Flat]:
        """What the run comes to: of each name the best weights on the validation split, else the last."""
        return {name: self.best[name].flat if name in self.best else flat for name, flat in self.last().items()}

    def evaluate(self, dataset: ImageSet | None, weights: dict[str, Flat]) -> dict[str, Evaluation]:
        """How good each of `weights` is; nothing without a data set."""
        if dataset is None:
            return {}
        found = {}
        with self.clock("evaluate"):
            dataset = dataset.to(self.device)
            for name, flat in weights.items():
                with self.buckets.holding(flat):
                    found[name] = self.evaluator(dataset)
        return found

    def end_epoch(self, totals: Totals) -> EpochRecord:
        """Averages, evaluates and records the epoch that has just ended, keeps its weights if they are the best, and
        adapts the rate.
        """
        self.averages.end_epoch(self.epoch)
        weights = self.last()
        if SWA in weights:
            if self.epoch == self.config.epochs:
                with self.clock("train"):
                    self.estimate_statistics()
            else:
                del weights[SWA]  # its batch norm statistics are measured at the end only
        validation, test = self.evaluate(self.validation, weights), self.evaluate(self.watched, weights)
        for name in validation.keys() - {SWA}:
            self.keep_if_best(name, weights[name], validation[name])
        record = self.record(totals, validation, test)
        if self.plateau:
            self.scale_lr(
                self.plateau.observe(record.train_loss if record.validation_loss is None else record.validation_loss)
            )
        return record

    def estimate_statistics(self) -> None:
        """Measures SWA's batch norm statistics over the training set, augmented as in the epoch after the last."""

        def forward(images: Tensor) -> None:
            self.shadow.refresh()
            with self.precision.autocast(self.device):
                self.objective.logits(images)

        torch.manual_seed(epoch_seed(Key(self.config.seed, self.epoch), Stream.DROPOUT))
        self.model.train()
        self.averages.estimate_statistics(
            self.model, forward, (images for images, _ in self.loader.batches(self.epoch))
        )

    def keep_if_best(self, name: str, flat: Flat, found: Evaluation) -> None:
        """Keeps a copy of `flat` where it is more accurate on the validation split, or as accurate with less loss,
        than any before.
        """
        best = self.best.get(name)
        if best and (found.accuracy, -found.loss) <= (best.score["accuracy"], -best.score["loss"]):
            return
        score: Best = {"epoch": self.epoch, "accuracy": found.accuracy, "loss": found.loss}
        self.best[name] = BestWeights(score, tuple(part.clone() for part in flat))

    def scale_lr(self, factor: float) -> None:
        """Sets the rate of all steps to come to `factor` times the schedule's."""
        self.lr[self.steps_done :] = [lr * factor for lr in self.unscaled_lr[self.steps_done :]]
        if self.book:
            self.book.change_rates(self.lr, self.steps_done)

    def record(self, totals: Totals, validation: dict[str, Evaluation], test: dict[str, Evaluation]) -> EpochRecord:
        """What the epoch that has just ended came to."""
        images = self.steps_per_epoch * self.config.batch_size
        return EpochRecord(
            epoch=self.epoch,
            epochs=self.config.epochs,
            step=self.steps_done,
            lr=self.lr[self.steps_done - 1],
            train_loss=totals.loss / images,
            train_accuracy=totals.correct / images,
            validation_loss=validation[WEIGHTS].loss if validation else None,
            validation_accuracy=validation[WEIGHTS].accuracy if validation else None,
            averaged_validation_accuracies=averaged_accuracies(validation),
            test_accuracy=test[WEIGHTS].accuracy if test else None,
            averaged_test_accuracies=averaged_accuracies(test),
            images_per_second=self.images_per_second,
            seconds=self.elapsed,
        )

    @property
    def images_per_second(self) -> float:
        """Training images over the time of training and loading, so far."""
        return self.steps_done * self.config.batch_size / max(self.seconds["train"] + self.seconds["load"], 1e-9)


def build_plateau(schedule: ScheduleConfig) -> Plateau | None:
    """What watches the loss, where the schedule is one that waits for plateaus."""
    given = schedule.resolved
    return Plateau(given.gamma, given.patience, given.final_lr) if given.schedule == "plateau" else None


def averaged_accuracies(found: dict[str, Evaluation]) -> dict[str, float]:
    """The accuracies of all but the weights themselves."""
    return {name: evaluation.accuracy for name, evaluation in found.items() if name != WEIGHTS}


def build_loader(config: RunConfig, train: ImageSet) -> Loader:
    """Unnormalised bytes, in full batches: the network normalises them itself, which the compiler fuses, and every
    step has one shape.
    """
    if config.batch_size > len(train):
        raise ConfigError(
            f"batch size {config.batch_size} exceeds the {len(train)} training images; lower --batch-size."
        )
    return Loader(
        train,
        config.data.augment,
        config.data.loader,
        config.batch_size,
        config.seed,
        config.engine.device,
        torch.uint8,
        normalize=config.data.normalize,
        drop_last=True,
        chunk_size=config.data.chunk_size,
    )
