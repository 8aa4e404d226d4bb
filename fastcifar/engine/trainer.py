"""The loop over the epochs of a run: training, evaluation, and the record of each."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from fastcifar.augment.random import Key, Stream, epoch_seed
from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.device import Precision, synchronize
from fastcifar.engine.compile import Obstacle
from fastcifar.engine.evaluate import Evaluation, Evaluator
from fastcifar.engine.launch import Launcher
from fastcifar.engine.memory import MemoryPlan
from fastcifar.engine.objective import ForwardPass, Objective
from fastcifar.engine.state import Clock, TrainingState
from fastcifar.engine.step import LiveMeter, Observer, Totals, unobserved
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.models import GIVEN, build_model, check_parameters
from fastcifar.models.count import NetworkCount, count_model, count_network
from fastcifar.optim.averaging import SWA, Flat
from fastcifar.runs.checkpoint import WEIGHTS, Network
from fastcifar.runs.records import EpochRecord

CALMER = (
    "lower --lr, lengthen --warmup, or bound the gradient with --clip-norm 1; if none of them helps, an operation of "
    "the network has an infinite gradient."
)
"""What to do where training diverged."""


class Trainer:
    """The model, optimizer and data of a run, and the loop over its epochs.

    Args:
        config: as `engine.setup.resolve` returns it.
        watched: the test images, where they are to be evaluated after every epoch.
        began: `time.perf_counter()` when the run, or its resumption, began; now by default.
        memory: how the run is laid out in memory, where that is known.
        model: a network to use in place of the one that `config` names; it is trained itself, not a copy.
        trust: whether a teacher's architecture may be code that is imported.
    """

    def __init__(
        self,
        config: RunConfig,
        train: ImageSet,
        validation: ImageSet | None = None,
        watched: ImageSet | None = None,
        *,
        began: float | None = None,
        memory: MemoryPlan | None = None,
        model: nn.Module | None = None,
        trust: bool = False,
    ) -> None:
        self.clock = Clock(time.perf_counter() if began is None else began)
        self.config, self.device, self.memory = config, torch.device(config.engine.device), memory
        self.precision = Precision(config.engine.precision)
        self.loader = build_loader(config, train)
        self.steps_per_epoch = len(self.loader)
        self.validation, self.watched = (part and part.to(self.device) for part in (validation, watched))
        torch.manual_seed(config.seed)
        self.options = {"classes": len(train.classes), "image_size": train.image_size, **config.model.options}
        model = build_model(config.model.arch, **self.options) if model is None else model
        check_parameters(sum(parameter.numel() for parameter in model.parameters()), config.model.max_params)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        normalization = self.loader.normalization
        network: Network = {
            "arch": config.model.arch,
            "options": self.options,
            "classes": list(train.classes),
            "mean": normalization.mean,
            "std": normalization.std,
        }
        self.state = TrainingState(self.model, network, config, self.steps_per_epoch, self.device, self.clock)
        forward = ForwardPass(self.model, normalization, self.precision, self.device)
        self.objective = Objective(forward, config.loss, train.classes, self.state.shadow.weights, trust)
        self.evaluator = Evaluator(forward, memory and memory.evaluation_batch)
        self.launch = Launcher(
            config, self.state, self.objective, self.evaluator, self.loader, lambda: self.count.training_flops
        )
        self.live_meter = LiveMeter(self.state.meter)
        self.running: tuple[float, float] | None = None
        """Loss and accuracy of the current epoch, some steps old."""

    @cached_property
    def count(self) -> NetworkCount:
        if self.config.model.arch == GIVEN:
            return count_model(copy.deepcopy(self.model).cpu(), self.options["image_size"])
        return count_network(self.config.model.arch, **self.options)

    def compile(self, announce: Callable[[], None] = lambda: None) -> float | Obstacle:
        """Announces and compiles the step where that pays; returns the seconds it took, or why it was not done."""
        with self.clock("compile"):
            return self.launch.compile(announce)

    def capture(self) -> int | Obstacle:
        """Captures the step where possible; returns the number of steps in a launch, or why it was not done."""
        with self.clock("compile"):
            return self.launch.capture()

    def run_epoch(
        self, stop: Callable[[], bool] = lambda: False, tick: Callable[[int], None] = lambda batch: None
    ) -> bool:
        """Trains to the end of the epoch, with `tick` given the batches done; False if `stop` ended it early.

        Raises FastcifarError where a loss was not finite.
        """
        state = self.state
        if state.batch == 0:
            state.meter.reset()
            self.seed_dropout()
        self.model.train()
        self.live_meter.forget()
        batches, self.running = self.loader.batches(state.epoch, state.batch), None
        while True:
            with self.clock("load"):
                batch = next(batches, None)
            if batch is None:
                break
            with self.clock("train"):
                self.launch(*batch)
            state.batch += 1
            if state.steps_done in state.cycle_ends:
                self.keep_snapshot()
            self.read_live()
            tick(state.batch)
            if stop() and state.batch < self.steps_per_epoch:
                self.launch.finish()
                return False
        with self.clock("train"):
            self.launch.finish()
            synchronize(self.device)
        state.epoch, state.batch = state.epoch + 1, 0
        return True

    def seed_dropout(self) -> None:
        torch.manual_seed(epoch_seed(Key(self.config.seed, self.state.epoch), Stream.DROPOUT))

    def keep_snapshot(self) -> None:
        """Keeps the weights of this step; waits for it."""
        with self.clock("train"):
            self.launch.finish()
            self.state.keep_snapshot()

    def read_live(self) -> None:
        """Updates `running` as far as possible without waiting. Raises FastcifarError where a loss was not finite."""
        reading = self.live_meter(self.state.batch, self.state.batch - self.launch.waiting)
        if reading is not None:
            totals, steps = reading
            self.check_finite(totals)
            images = steps * self.config.batch_size
            self.running = totals.loss / images, totals.correct / images

    def read_totals(self) -> Totals:
        """Reads the epoch's totals; waits for the device.

        Raises FastcifarError where a loss was not finite, or where the weights are not since the last update.
        """
        totals, state = self.state.meter.read(), self.state
        self.check_finite(totals)
        if not torch.stack(torch.aminmax(state.buckets.flat[0])).isfinite().all():
            raise FastcifarError(
                f"the weights became infinite or NaN {self.place_of(state.steps_done - 1)}; {self.remedy}"
            )
        return totals

    def check_finite(self, totals: Totals) -> None:
        """Raises FastcifarError where the loss of a step since the epoch began was not finite."""
        bad = totals.first_bad_step
        if bad is None:
            return
        if not any(self.state.lr[:bad]):
            raise FastcifarError(
                f"the loss is infinite or NaN {self.place_of(bad)}, before anything was learnt; mend the network, its "
                "teacher or the images, or choose --precision fp32."
            )
        raise FastcifarError(f"the loss became infinite or NaN {self.place_of(bad)}; {self.remedy}")

    @property
    def remedy(self) -> str:
        """What may keep the numbers finite, by what is the likelier cause."""
        if (self.config.optim.resolved.weight_decay or 0) >= 1:
            return "lower --weight-decay, which is customarily below 0.1."
        return CALMER

    def place_of(self, step: int) -> str:
        epoch, lr = step // self.steps_per_epoch + 1, self.state.lr[step]
        return f"at step {step} of {self.state.total_steps} (epoch {epoch}, lr {lr:.4g})"

    def end_epoch(self, totals: Totals) -> EpochRecord:
        """Averages, evaluates and records the epoch just ended, keeps the best weights, and adapts the rate."""
        state = self.state
        state.averages.end_epoch(state.epoch)
        weights = state.last()
        if SWA in weights:
            if state.epoch == self.config.epochs:
                with self.clock("train"):
                    self.estimate_statistics()
            else:
                del weights[SWA]  # its batch norm statistics are measured at the end only
        validation, test = self.evaluate(self.validation, weights), self.evaluate(self.watched, weights)
        for name in validation.keys() - {SWA}:
            state.keep_if_best(name, weights[name], validation[name])
        record = self.record(totals, validation, test)
        if state.plateau:
            loss = record.train_loss if record.validation_loss is None else record.validation_loss
            state.scale_lr(state.plateau.observe(loss))
        return record

    def estimate_statistics(self) -> None:
        """Measures SWA's batch norm statistics on the training set, augmented as in the epoch after the last."""

        def forward(images: Tensor) -> None:
            self.state.shadow.refresh()
            self.objective.logits(images)

        self.seed_dropout()
        self.model.train()
        images = (images for images, _ in self.loader.batches(self.state.epoch))
        self.state.averages.estimate_statistics(self.model, forward, images)

    def evaluate(self, dataset: ImageSet | None, weights: dict[str, Flat]) -> dict[str, Evaluation]:
        """Evaluates each of `weights`; returns an empty dict without a data set.

        Raises FastcifarError where outputs are not finite.
        """
        if dataset is None:
            return {}
        found = {}
        with self.clock("evaluate"):
            dataset = dataset.to(self.device)
            for name, flat in weights.items():
                with self.state.buckets.holding(flat):
                    found[name] = self.evaluator(dataset)
                if not math.isfinite(found[name].loss):
                    raise FastcifarError(
                        f"the network's outputs are infinite or NaN in the evaluation of {name} after step "
                        f"{self.state.steps_done} of {self.state.total_steps}; {self.remedy}"
                    )
        return found

    def record(self, totals: Totals, validation: dict[str, Evaluation], test: dict[str, Evaluation]) -> EpochRecord:
        state, images = self.state, self.steps_per_epoch * self.config.batch_size
        return EpochRecord(
            epoch=state.epoch,
            epochs=self.config.epochs,
            step=state.steps_done,
            lr=state.lr[state.steps_done - 1],
            train_loss=totals.loss / images,
            train_accuracy=totals.correct / images,
            validation_loss=validation[WEIGHTS].loss if validation else None,
            validation_accuracy=validation[WEIGHTS].accuracy if validation else None,
            averaged_validation_accuracies=averaged_accuracies(validation),
            test_loss=test[WEIGHTS].loss if test else None,
            test_accuracy=test[WEIGHTS].accuracy if test else None,
            averaged_test_accuracies=averaged_accuracies(test),
            images_per_second=self.images_per_second,
            seconds=self.clock.elapsed,
        )

    @property
    def images_per_second(self) -> float:
        """Training images per second of training and loading, so far."""
        seconds = self.clock.seconds
        return self.state.steps_done * self.config.batch_size / max(seconds["train"] + seconds["load"], 1e-9)

    def endless_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of one epoch after another, for `run_steps`; after the last epoch it starts over."""
        while True:
            yield from self.loader.batches(self.state.epoch)
            self.launch.finish()
            self.state.turn_to((self.state.epoch + 1) % self.config.epochs, 0)

    def run_steps(self, batches: Iterator[tuple[Tensor, Tensor]], count: int, observe: Observer = unobserved) -> float:
        """Trains for `count` steps without evaluation or records; returns the seconds, waiting for the device included.

        Waiting for a batch, "Batches", and each part of a step, by its class's name, run within `observe`.
        """
        self.model.train()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            with observe("Batches"):
                batch = next(batches)
            self.launch(*batch, observe)
            self.state.batch += 1
        self.launch.finish()
        synchronize(self.device)
        return time.perf_counter() - start


def averaged_accuracies(found: dict[str, Evaluation]) -> dict[str, float]:
    return {name: evaluation.accuracy for name, evaluation in found.items() if name != WEIGHTS}


def build_loader(config: RunConfig, train: ImageSet) -> Loader:
    """Builds a loader of bytes that the network itself normalises, which the compiler fuses.

    Batches are full, so every step has one shape. Raises ConfigError where a batch exceeds the training set.
    """
    if config.batch_size > len(train):
        raise ConfigError(
            f"batch size {config.batch_size} exceeds the {len(train)} training images; lower --batch-size."
        )
    data, device = config.data, config.engine.device
    options = {"normalize": data.normalize, "chunk_size": data.chunk_size, "drop_last": True}
    return Loader(train, data.augment, data.loader, config.batch_size, config.seed, device, torch.uint8, **options)
