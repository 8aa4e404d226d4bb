"""The state that training changes and a checkpoint holds: weights, momenta, averages, rates and times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcifar.checks import given
from fastcifar.config import RunConfig
from fastcifar.device import Precision, random_state_of, set_random_state
from fastcifar.engine.evaluate import Evaluation
from fastcifar.engine.shadow import Shadow, shadow_dtype
from fastcifar.engine.step import DeviceBook, Meter
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.averaging import Averages, Buckets, Flat
from fastcifar.optim.optimizers import build_optimizer
from fastcifar.optim.plateau import Plateau
from fastcifar.optim.schedules import cycle_ends, lr_table, momentum_table
from fastcifar.runs.checkpoint import WEIGHTS, Best, Checkpoint, Network, Progress, copy_tensors


class Clock:
    """Measures a run's seconds without interruptions; `began` is `time.perf_counter()` when this session began."""

    def __init__(self, began: float) -> None:
        self.began, self.earlier = began, 0.0
        read = time.perf_counter() - began
        self.seconds = defaultdict(float, read=read, load=0.0, compile=0.0, train=0.0, evaluate=0.0)
        """Seconds by phase; `read` loads the whole data set, `load` is waiting for batches."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def go_on(self, progress: Progress) -> None:
        self.earlier = progress["elapsed"]
        for phase, seconds in progress["seconds"].items():
            self.seconds[phase] += seconds


@dataclass(frozen=True)
class BestWeights:
    score: Best
    flat: Flat


class TrainingState:
    """The state of a run; `network` describes how its `model`, which is on `device`, is built and fed."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        config: RunConfig,
        steps_per_epoch: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self.model, self.network, self.device, self.clock = model, network, device, clock
        self.epochs, self.steps_per_epoch = config.epochs, steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.epoch, self.batch = 0, 0
        """Epochs done, and batches done in the current one."""
        self.images: dict[str, str] = {}
        """Digests of the training and the test set, by split; empty where they are not known."""
        precision, schedule = Precision(config.engine.precision), config.schedule.resolved
        self.buckets = Buckets(model)
        self.momentum = None
        """Momentum of every step, where the schedule sets it."""
        if OPTIMIZERS[config.optim.optimizer].takes_cycles:
            self.momentum = momentum_table(config.schedule, steps_per_epoch, config.epochs)
        self.optimizer = build_optimizer(model, config.optim, cycled=self.momentum is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scaled)
        self.shadow = Shadow(model, self.buckets.flat[0], shadow_dtype(config.model.arch, device, precision.dtype))
        peak_lr = config.optim.peak_lr(config.batch_size)
        self.lr = lr_table(config.schedule, peak_lr, steps_per_epoch, config.epochs)
        self.averages = Averages(self.buckets, config.average, steps_per_epoch, config.epochs)
        self.scheduled_lr = tuple(self.lr)
        """Learning rate of every step, without the changes that a plateau made."""
        self.plateau = None
        if schedule.schedule == "plateau":
            self.plateau = Plateau(given(schedule.gamma), given(schedule.patience), given(schedule.final_lr))
        self.meter = Meter(device)
        on_gpu = device.type == "cuda"
        self.book = None
        if on_gpu:
            self.book = DeviceBook(self.meter, self.optimizer, self.lr, self.averages.decays, self.momentum)
        self.best: dict[str, BestWeights] = {}
        """Best weights so far, by name; empty without a validation split."""
        ends = cycle_ends(config.schedule, steps_per_epoch, config.epochs) if schedule.snapshots else ()
        self.cycle_ends = {end: f"snapshot-{number}" for number, end in enumerate(ends, start=1)}
        """Names of the snapshots, by the number of steps done at the end of their cycle."""
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        """Weights at the ends of the cycles so far, on the CPU (Huang et al. 2017, arXiv:1704.00109)."""

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.batch

    def last(self) -> dict[str, Flat]:
        return {WEIGHTS: self.buckets.flat, **self.averages.flat}

    def chosen(self) -> dict[str, Flat]:
        """Returns, by name, the weights that were best on the validation split, or else the last."""
        return {name: self.best[name].flat if name in self.best else flat for name, flat in self.last().items()}

    def keep_if_best(self, name: str, flat: Flat, found: Evaluation) -> None:
        """Keeps a copy of `flat` if it has the best validation accuracy so far; lower loss decides between equals."""
        best = self.best.get(name)
        if best and (found.accuracy, -found.loss) <= (best.score["accuracy"], -best.score["loss"]):
            return
        score: Best = {"epoch": self.epoch, "accuracy": found.accuracy, "loss": found.loss}
        self.best[name] = BestWeights(score, tuple(part.clone() for part in flat))

    def keep_snapshot(self) -> None:
        """Keeps the weights at the end of a cycle, with their batch norm statistics."""
        kept = self.named(self.buckets.flat)
        self.snapshots[self.cycle_ends[self.steps_done]] = {name: tensor.cpu() for name, tensor in kept.items()}

    def scale_lr(self, factor: float) -> None:
        """Sets the rates of all steps to come to `factor` times the schedule's."""
        self.lr[self.steps_done :] = [lr * factor for lr in self.scheduled_lr[self.steps_done :]]
        if self.book:
            self.book.change_rates(self.lr, self.steps_done)

    def turn_to(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch
        if self.book:
            self.book.turn_to(self.steps_done)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.shadow.drop()

    def named(self, flat: Flat) -> dict[str, Tensor]:
        """Returns a copy of the weights `flat` under the model's names."""
        with self.buckets.holding(flat):
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the optimizer and the meter, and a copy of the random state."""
        tensors = {"meter": self.meter.sums, "random": random_state_of(self.device)}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restores everything after the block, which may run steps, unless CUDA has failed."""
        weights = [part for flat in self.last().values() for part in flat]
        changing, put_back_buffers = [*weights, *self.tensors().values()], self.buckets.keep_buffers()
        kept, random_state = [tensor.clone() for tensor in changing], random_state_of(self.device)
        scaler = self.scaler.state_dict()
        lost = False
        try:
            yield
        except torch.AcceleratorError:
            lost = True
            raise
        finally:
            if not lost:
                self.drop_gradients()
                put_back_buffers()
                for tensor, before in zip(changing, kept, strict=True):
                    tensor.copy_(before)
                self.turn_to(self.epoch, self.batch)
                set_random_state(self.device, random_state)
                if self.scaler.is_enabled():
                    self.scaler.load_state_dict(scaler)

    def checkpoint(self) -> Checkpoint:
        """Returns all that is needed to continue with bitwise identical results."""
        progress: Progress = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.steps_done,
            "elapsed": self.clock.elapsed,
            "seconds": dict(self.clock.seconds),
            "scaler": self.scaler.state_dict(),
            "plateau": self.plateau.state() if self.plateau else {},
            "averages": list(self.averages.flat),
            "snapshots": list(self.snapshots),
            "best": {name: best.score for name, best in self.best.items()},
        }
        if self.images:
            progress["images"] = self.images
        last = {name: self.named(flat) for name, flat in self.last().items()}
        best = {name: self.named(best.flat) for name, best in self.best.items()}
        return Checkpoint(last | self.snapshots, best, self.tensors(), progress, self.network)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the state from `checkpoint`. Raises FastcifarError where it does not fit."""
        progress, own = checkpoint.progress, self.tensors()
        snapshots = self.check_fit(checkpoint)
        for name, tensors in checkpoint.best.items():
            copy_tensors(tensors, self.model.state_dict(), f"the checkpoint's best {name}")
            self.best[name] = BestWeights(progress["best"][name], self.buckets.copies())
        # The weights themselves, which come last, stay in the model.
        for name, flat in reversed(self.last().items()):
            copy_tensors(checkpoint.weights[name], self.model.state_dict(), f"the checkpoint's {name}")
            for target, origin in zip(flat, self.buckets.flat, strict=True):
                target.copy_(origin)
        self.snapshots = {name: checkpoint.weights[name] for name in snapshots}
        copy_tensors(checkpoint.state, own, "the checkpoint's state")
        self.turn_to(progress["epoch"], progress["batch"])
        self.images = progress.get("images", {})
        try:
            set_random_state(self.device, own["random"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(progress["scaler"])
            if self.plateau:
                self.plateau.restore(progress["plateau"])
                self.scale_lr(self.plateau.factor)
        except (RuntimeError, KeyError, ConfigError) as error:
            raise FastcifarError(f"the checkpoint's state is damaged ({error}); start the run again.") from error
        self.clock.go_on(progress)

    def check_fit(self, checkpoint: Checkpoint) -> list[str]:
        """Returns the names of the snapshots due. Raises FastcifarError where the checkpoint is not one of this run."""
        progress, kept = checkpoint.progress, self.last().keys()
        epoch, batch, step = progress["epoch"], progress["batch"], progress["step"]
        due = [name for end, name in self.cycle_ends.items() if end <= step]
        if not (
            0 <= epoch <= self.epochs
            and 0 <= batch < self.steps_per_epoch
            and step == epoch * self.steps_per_epoch + batch
            and progress["snapshots"] == due
            and checkpoint.weights.keys() == kept | set(due)
            and checkpoint.best.keys() <= kept
        ):
            raise FastcifarError(
                "the checkpoint's progress does not fit the run; give the configuration that it was made with."
            )
        return due
