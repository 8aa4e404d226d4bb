"""A run from its configuration to its result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization
from fastcifar.augment.random import Key, Stream, epoch_seed
from fastcifar.averaging import Buckets, ExponentialAverage
from fastcifar.config import RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.engine.evaluate import Evaluation, evaluate
from fastcifar.engine.graph import compile_where_it_pays
from fastcifar.engine.host import synchronize
from fastcifar.engine.precision import Precision
from fastcifar.engine.step import Average, Backward, Clip, Forward, Meter, Objective, Step, Totals, Update, Workspace
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.kernels.augment import normalize_reference
from fastcifar.losses import cross_entropy
from fastcifar.models import build_model
from fastcifar.optim.optimizers import build_optimizer
from fastcifar.optim.schedules import Duration, lr_table
from fastcifar.runs.checkpoint import Checkpoint, Progress, copy_tensors, load_weights
from fastcifar.runs.records import EpochRecord


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
        self.scale, self.offset = self.normalization.affine(self.device)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validation, self.watched = (part and part.to(self.device) for part in (validation, watched))
        torch.manual_seed(config.seed)
        options = {"classes": len(train.classes), "image_size": train.images.shape[1], **config.model.options}
        self.model = build_model(config.model.arch, **options).to(self.device, memory_format=torch.channels_last)
        self.buckets = Buckets(self.model)
        optim = config.optim
        self.optimizer = build_optimizer(self.model, optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        decays = config.average.decays
        self.average = ExponentialAverage(self.buckets, decays[0], self.total_steps) if decays else None
        self.lr = build_lr(config, self.steps_per_epoch)
        self.meter = Meter(self.device)
        self.epoch, self.batch = 0, 0
        self.seconds: Counter[str] = Counter(read=now - self.began, load=0.0, compile=0.0, train=0.0, evaluate=0.0)
        """By phase; `read` is of the whole data set, `load` the waiting for batches."""
        self.network = {"arch": config.model.arch, "options": options, "classes": train.classes, **asdict(self.normalization)}
        self.step = self.build_step(self.objective)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.batch

    def objective(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The forward pass, from uint8 (B, 3, H, W) to the mean loss and the number of right answers; compiled as a whole.

        Labels are int64 (B,), or float32 (B, classes) of mixed images, whose answer is the larger share.
        """
        with self.precision.autocast(self.device):
            logits = self.model(
                normalize_reference(images.permute(0, 2, 3, 1), self.scale, self.offset, self.precision.dtype).permute(0, 3, 1, 2)
            )
        loss = cross_entropy(logits, labels, self.config.loss.resolved.label_smoothing)
        hard = labels if labels.dim() == 1 else labels.argmax(dim=1)
        return loss, (logits.detach().argmax(dim=1) == hard).sum()

    def build_step(self, objective: Objective) -> Step:
        """The parts of a step, in order."""
        clip, lr = self.config.optim.clip_norm, self.lr
        on_device = torch.tensor(lr, device=self.device) if self.device.type == "cuda" else lr
        parts: list[Callable[[Workspace], None]] = [Forward(objective), Backward(self.scaler)]
        parts += [Clip(self.optimizer, self.scaler, clip)] if clip else []
        parts += [Update(self.optimizer, self.scaler, on_device)]
        parts += [Average(self.average)] if self.average else []
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

    def rehearse(self, objective: Objective) -> None:
        """One forward and backward pass that leaves weights, buffers and random state as they were."""
        kept, random_state = self.buckets.flat[1].clone(), random_state_of(self.device)
        size, count = self.loader.dataset.images.shape[1:3], self.config.batch_size
        images = torch.zeros(count, *size, 3, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        soft = F.one_hot(labels, len(self.loader.dataset.classes)).float()
        try:
            loss, _ = objective(images, soft if self.loader.policy.mix else labels)
            loss.backward()
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

    def evaluate(self, dataset: ImageSet | None) -> tuple[Evaluation | None, Evaluation | None]:
        """Of the weights and of their average, where there are a data set and an average."""
        if dataset is None:
            return None, None
        with self.clock("evaluate"):
            dataset = dataset.to(self.device)
            raw = evaluate(self.model, dataset, self.normalization, self.precision)
            if self.average is None:
                return raw, None
            with self.average.swapped_in():
                return raw, evaluate(self.model, dataset, self.normalization, self.precision)

    def record(self, totals: Totals) -> EpochRecord:
        """What the epoch that has just ended came to."""
        images = self.steps_per_epoch * self.config.batch_size
        validation, averaged = self.evaluate(self.validation)
        test, averaged_test = self.evaluate(self.watched)
        return EpochRecord(
            epoch=self.epoch,
            epochs=self.config.epochs,
            step=self.steps_done,
            lr=self.lr[self.steps_done - 1],
            train_loss=totals.loss / images,
            train_accuracy=totals.correct / images,
            validation_loss=validation and validation.loss,
            validation_accuracy=validation and validation.accuracy,
            averaged_validation_accuracy=averaged and averaged.accuracy,
            test_accuracy=test and test.accuracy,
            averaged_test_accuracy=averaged_test and averaged_test.accuracy,
            images_per_second=self.images_per_second,
            seconds=self.elapsed,
        )

    @property
    def images_per_second(self) -> float:
        """Training images over the time of training and loading, so far."""
        return self.steps_done * self.config.batch_size / max(self.seconds["train"] + self.seconds["load"], 1e-9)

    def state(self) -> dict[str, Tensor]:
        """What training goes on from besides the weights: the tensors of the optimiser and the meter, and a copy of the random state."""
        state = {"meter": self.meter.sums, "random": random_state_of(self.device)}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = tensor
        return state

    def checkpoint(self) -> Checkpoint:
        """The state to go on from, to the bit."""
        averaged = {}
        if self.average:
            with self.average.swapped_in():
                averaged = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        progress: Progress = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.steps_done,
            "elapsed": self.elapsed,
            "seconds": dict(self.seconds),
            "scaler": self.scaler.state_dict(),
        }
        return Checkpoint(dict(self.model.state_dict()), averaged, self.state(), progress, self.network)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from `checkpoint`. Raises FastcifarError where it does not fit."""
        progress, state = checkpoint.progress, self.state()
        within = 0 <= progress["epoch"] <= self.config.epochs and 0 <= progress["batch"] < self.steps_per_epoch
        if not within or progress["step"] != progress["epoch"] * self.steps_per_epoch + progress["batch"]:
            raise FastcifarError("the checkpoint's progress does not fit the run; give the configuration that it was made with.")
        if self.average:
            load_weights(self.model, checkpoint.averaged, "the checkpoint's average")
            self.average.copy(self.buckets.flat, self.average.averages)
        load_weights(self.model, checkpoint.weights, "the checkpoint")
        copy_tensors(checkpoint.state, state, "the checkpoint's state")
        try:
            set_random_state(self.device, state["random"])
            if self.precision.scaled:
                self.scaler.load_state_dict(progress["scaler"])
        except (RuntimeError, KeyError) as error:
            raise FastcifarError(f"the checkpoint's state is damaged ({error}); start the run again.") from error
        self.epoch, self.batch = progress["epoch"], progress["batch"]
        self.earlier = progress["elapsed"]
        self.seconds.update(progress["seconds"])


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


def build_lr(config: RunConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step of the run."""
    total = config.epochs * steps_per_epoch
    warmup = Duration.parse(config.schedule.warmup).steps(steps_per_epoch, total)
    return lr_table(config.schedule.schedule, config.optim.peak_lr(config.batch_size), warmup, total)


def random_state_of(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from, uint8 (bytes,)."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
