"""A run from its configuration to its result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization
from fastcifar.augment.random import Key, Stream, epoch_seed
from fastcifar.averaging import SWA, Averages, Buckets, Flat
from fastcifar.config import RunConfig, ScheduleConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.engine.evaluate import Evaluation, evaluate
from fastcifar.engine.graph import compile_where_it_pays
from fastcifar.engine.host import random_state_of, set_random_state, synchronize
from fastcifar.engine.objective import Objective, Outcome
from fastcifar.engine.precision import Precision
from fastcifar.engine.step import Average, Backward, Clip, Forward, Meter, Part, Step, Totals, Update, Workspace
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.models import build_model
from fastcifar.optim.optimizers import build_optimizer
from fastcifar.optim.schedules import Plateau, lr_table
from fastcifar.optim.sharpness import Ascend, Return
from fastcifar.runs.checkpoint import WEIGHTS, Best, Checkpoint, Progress, copy_tensors, load_weights
from fastcifar.runs.records import EpochRecord


@dataclass(frozen=True)
class BestWeights:
    score: Best
    flat: Flat


class Trainer:
    """Model, optimiser and data of a run, and the loop over its epochs.

    Args:
        config: with its choices made (`engine.resolve`), but for compiling.
        train: the training images.
        validation: images set apart, or None.
        watched: the test images, where they are to be evaluated every epoch, or None.
        began: `time.perf_counter()` when the run, or its resumption, began.
    """

    def __init__(
        self,
        config: RunConfig,
        train: ImageSet,
        validation: ImageSet | None = None,
        watched: ImageSet | None = None,
        began: float | None = None,
    ) -> None:
        now = time.perf_counter()
        self.began = now if began is None else began
        self.earlier = 0.0
        """Seconds before the last resumption."""
        self.config, self.device = config, torch.device(config.engine.device)
        self.precision = Precision(config.engine.precision)
        self.loader = build_loader(config, train)
        self.normalization: Normalization = self.loader.normalization
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validation, self.watched = (part and part.to(self.device) for part in (validation, watched))
        torch.manual_seed(config.seed)
        options = {"classes": len(train.classes), "image_size": train.images.shape[1], **config.model.options}
        self.model = build_model(config.model.arch, **options).to(self.device, memory_format=torch.channels_last)
        self.buckets = Buckets(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        self.averages = Averages(self.buckets, config.average, self.steps_per_epoch, config.epochs)
        self.best: dict[str, BestWeights] = {}
        """By name of the weights; empty without a validation split."""
        self.lr = lr_table(config.schedule, config.optim.peak_lr(config.batch_size), self.steps_per_epoch, config.epochs)
        self.lr_on_device = torch.tensor(self.lr, device=self.device) if self.device.type == "cuda" else self.lr
        self.unscaled_lr = tuple(self.lr)
        self.plateau = build_plateau(config.schedule)
        self.meter = Meter(self.device)
        self.epoch, self.batch = 0, 0
        self.seconds: Counter[str] = Counter(read=now - self.began, load=0.0, compile=0.0, train=0.0, evaluate=0.0)
        """By phase; `read` is of the whole data set, `load` the waiting for batches."""
        self.network = {"arch": config.model.arch, "options": options, "classes": train.classes, **asdict(self.normalization)}
        self.objective = Objective(self.model, self.normalization, self.precision, config.loss, self.device, train.classes)
        self.step = self.build_step(self.objective)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.batch

    def build_step(self, objective: Callable[[Tensor, Tensor], Outcome]) -> Step:
        """The parts of a step, in order."""
        optim = self.config.optim.resolved
        forward, backward = Forward(objective), Backward(self.scaler)
        parts: list[Part] = [forward, backward]
        if optim.sharpness != "none":
            ascend = Ascend(self.model, self.buckets, optim)
            parts += [ascend, forward, backward, Return(ascend)]
        parts += [Clip(self.optimizer, self.scaler, optim.clip_norm)] if optim.clip_norm else []
        parts += [Update(self.optimizer, self.scaler, self.lr_on_device)]
        parts += [Average(self.averages)] if self.config.average.decays else []
        return Step((*parts, self.meter))

    def compile(self) -> str:
        """Compiles the forward and backward pass where that pays; the choice goes into `config`, a line about it is returned."""
        remaining = self.total_steps - self.steps_done
        with self.clock("compile"):
            outcome = compile_where_it_pays(self.objective, self.config.engine.compile, self.rehearse, remaining)
        self.step = self.build_step(outcome.function)
        choice = "on" if outcome.compiled else "off"
        self.config = replace(self.config, engine=replace(self.config.engine, compile=choice))
        return outcome.message

    def rehearse(self, objective: Callable[[Tensor, Tensor], Outcome]) -> None:
        """One forward and backward pass that leaves weights, buffers and random state as they were."""
        kept, random_state = self.buckets.flat[1].clone(), random_state_of(self.device)
        size, count = self.loader.dataset.images.shape[1:3], self.config.batch_size
        images = torch.zeros(count, *size, 3, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        soft = F.one_hot(labels, len(self.loader.dataset.classes)).float()
        try:
            objective(images, soft if self.loader.policy.mix else labels).loss.backward()
            synchronize(self.device)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.buckets.flat[1].copy_(kept)
            set_random_state(self.device, random_state)

    def run_epoch(self, stop: Callable[[], bool], tick: Callable[[int], None]) -> bool:
        """Trains to the end of the epoch, from where it stands; False where `stop` said so before."""
        if self.batch == 0:
            self.meter.reset()
            torch.manual_seed(epoch_seed(Key(self.config.seed, self.epoch), Stream.DROPOUT))
        self.model.train()
        batches = self.loader.batches(self.epoch, self.batch)
        while True:
            with self.clock("load"):
                batch = next(batches, None)
            if batch is None:
                break
            with self.clock("train"):
                self.step(Workspace(self.steps_done, *batch))
            self.batch += 1
            tick(self.batch)
            if stop() and self.batch < self.steps_per_epoch:
                return False
        with self.clock("train"):
            synchronize(self.device)
        self.epoch, self.batch = self.epoch + 1, 0
        return True

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
                f"the loss became infinite or NaN at step {bad} of {self.total_steps} (epoch {bad // self.steps_per_epoch + 1}, "
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
                    found[name] = evaluate(self.model, dataset, self.normalization, self.precision)
        return found

    def end_epoch(self, totals: Totals) -> EpochRecord:
        """Averages, evaluates and records the epoch that has just ended, keeps its weights if they are the best, and adapts the rate."""
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
            self.scale_lr(self.plateau.observe(record.train_loss if record.validation_loss is None else record.validation_loss))
        return record

    def estimate_statistics(self) -> None:
        """Measures SWA's batch norm statistics over the training set, augmented as in the epoch after the last."""

        def forward(images: Tensor) -> None:
            with self.precision.autocast(self.device):
                self.objective.logits(images)

        torch.manual_seed(epoch_seed(Key(self.config.seed, self.epoch), Stream.DROPOUT))
        self.model.train()
        self.averages.estimate_statistics(self.model, forward, (images for images, _ in self.loader.batches(self.epoch)))

    def keep_if_best(self, name: str, flat: Flat, found: Evaluation) -> None:
        """Keeps a copy of `flat` where it is more accurate on the validation split, or as accurate with less loss, than any before."""
        best = self.best.get(name)
        if best and (found.accuracy, -found.loss) <= (best.score["accuracy"], -best.score["loss"]):
            return
        score: Best = {"epoch": self.epoch, "accuracy": found.accuracy, "loss": found.loss}
        self.best[name] = BestWeights(score, tuple(part.clone() for part in flat))

    def scale_lr(self, factor: float) -> None:
        """Sets the rate of all steps to come to `factor` times the schedule's."""
        self.lr[self.steps_done :] = [lr * factor for lr in self.unscaled_lr[self.steps_done :]]
        if isinstance(self.lr_on_device, Tensor):
            self.lr_on_device.copy_(torch.tensor(self.lr))

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

    def state(self) -> dict[str, Tensor]:
        """What training goes on from besides the weights: tensors of optimiser, meter and averages, and a copy of the random state."""
        state = {"meter": self.meter.sums, "random": random_state_of(self.device), "swa_counts": self.averages.swa_counts}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"optimizer.{key}.{name}"] = value
        return state

    def named(self, flat: Flat) -> dict[str, Tensor]:
        """A copy of the weights `flat` under the model's names."""
        with self.buckets.holding(flat):
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def checkpoint(self) -> Checkpoint:
        """The state to go on from, to the bit."""
        progress: Progress = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.steps_done,
            "elapsed": self.elapsed,
            "seconds": dict(self.seconds),
            "scaler": self.scaler.state_dict(),
            "plateau": self.plateau.state() if self.plateau else {},
            "averages": list(self.averages.flat),
            "best": {name: best.score for name, best in self.best.items()},
        }
        last = {name: self.named(flat) for name, flat in self.last().items()}
        best = {name: self.named(best.flat) for name, best in self.best.items()}
        return Checkpoint(last, best, self.state(), progress, self.network)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from `checkpoint`. Raises FastcifarError where it does not fit."""
        progress, state = checkpoint.progress, self.state()
        within = 0 <= progress["epoch"] <= self.config.epochs and 0 <= progress["batch"] < self.steps_per_epoch
        fits = progress["step"] == progress["epoch"] * self.steps_per_epoch + progress["batch"]
        if not (within and fits and checkpoint.weights.keys() == self.last().keys() and checkpoint.best.keys() <= self.last().keys()):
            raise FastcifarError("the checkpoint's progress does not fit the run; give the configuration that it was made with.")
        for name, tensors in checkpoint.best.items():
            load_weights(self.model, tensors, f"the checkpoint's best {name}")
            self.best[name] = BestWeights(progress["best"][name], self.buckets.copies())
        for name, flat in reversed(self.last().items()):  # the weights themselves, which are last to come, stay in the model
            load_weights(self.model, checkpoint.weights[name], f"the checkpoint's {name}")
            for target, origin in zip(flat, self.buckets.flat, strict=True):
                target.copy_(origin)
        copy_tensors(checkpoint.state, state, "the checkpoint's state")
        self.epoch, self.batch = progress["epoch"], progress["batch"]
        try:
            set_random_state(self.device, state["random"])
            if self.precision.scaled:
                self.scaler.load_state_dict(progress["scaler"])
            if self.plateau:
                self.plateau.restore(progress["plateau"])
                self.scale_lr(self.plateau.factor)
        except (RuntimeError, KeyError) as error:
            raise FastcifarError(f"the checkpoint's state is damaged ({error}); start the run again.") from error
        self.earlier = progress["elapsed"]
        self.seconds.update(progress["seconds"])


def build_plateau(schedule: ScheduleConfig) -> Plateau | None:
    """What watches the loss, where the schedule is one that waits for plateaus."""
    given = schedule.resolved
    return Plateau(given.gamma, given.patience, given.final_lr) if given.schedule == "plateau" else None


def averaged_accuracies(found: dict[str, Evaluation]) -> dict[str, float]:
    """Of all but the weights themselves."""
    return {name: evaluation.accuracy for name, evaluation in found.items() if name != WEIGHTS}


def build_loader(config: RunConfig, train: ImageSet) -> Loader:
    """Unnormalised bytes, in full batches: the network normalises them itself, which the compiler fuses, and every step has one shape."""
    if config.batch_size > len(train):
        raise ConfigError(f"batch size {config.batch_size} exceeds the {len(train)} training images; lower --batch-size.")
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
