"""One training step: a tuple of parts that each do one thing to a shared workspace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fastcifar.checks import given
from fastcifar.engine.objective import BatchMetrics
from fastcifar.engine.shadow import Shadow
from fastcifar.kernels.bookkeeping import NEVER, advance_, set_rates_and_decays
from fastcifar.optim.averaging import Averages


@dataclass
class Workspace:
    """The values that the parts of a step pass to one another."""

    step: int | None
    """Number of the step, from 0 over the whole run; None on a GPU, which keeps the count itself."""
    images: Tensor
    labels: Tensor
    loss: Tensor | None = None
    metrics: BatchMetrics | None = None


Part = Callable[[Workspace], None]
Observer = Callable[[str], AbstractContextManager[object]]
"""Returns the context manager for a part of a step, given the name of the part's class."""


def unobserved(name: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Step:
    parts: tuple[Part, ...]

    def __call__(self, work: Workspace, observe: Observer = unobserved) -> None:
        for part in self.parts:
            with observe(type(part).__name__):
                part(work)


@dataclass(frozen=True)
class Forward:
    """Computes the loss; where a step has two passes, the metrics are those of the first."""

    objective: Callable[[Tensor, Tensor], BatchMetrics]
    shadow: Shadow

    def __call__(self, work: Workspace) -> None:
        self.shadow.refresh()
        metrics = self.objective(work.images, work.labels)
        work.loss = metrics.loss
        work.metrics = work.metrics or metrics


@dataclass(frozen=True)
class Backward:
    scaler: torch.amp.GradScaler
    shadow: Shadow

    def __call__(self, work: Workspace) -> None:
        self.scaler.scale(given(work.loss)).backward()
        self.shadow.deposit()


@dataclass(frozen=True)
class SlicedPass:
    """`Forward` and `Backward` over slices of `micro_batch` images; the last slice holds what remains.

    The gradients add up to those of the mean loss over the batch, so the update differs by the order of summation only.
    Batch norm normalises each slice by its own statistics and updates its running statistics once a slice, as if
    several GPUs shared the batch. Nothing waits for the device.
    """

    objective: Callable[[Tensor, Tensor], BatchMetrics]
    scaler: torch.amp.GradScaler
    shadow: Shadow
    micro_batch: int

    def __call__(self, work: Workspace) -> None:
        """Accumulates the gradients; stores the metrics as `Forward` does, and the batch's mean loss, detached."""
        self.shadow.refresh()
        slices = zip(work.images.split(self.micro_batch), work.labels.split(self.micro_batch), strict=True)
        passes = [self.pass_over(images, labels, len(work.labels)) for images, labels in slices]
        metrics = BatchMetrics(*(reduce(torch.add, parts) for parts in zip(*passes, strict=True)))
        work.loss = metrics.loss
        work.metrics = work.metrics or metrics

    def pass_over(self, images: Tensor, labels: Tensor, batch_size: int) -> BatchMetrics:
        """Adds a slice's gradient; returns its share of the batch's mean loss, detached, and its correct answers."""
        metrics = self.objective(images, labels)
        loss = metrics.loss * (len(labels) / batch_size)
        self.scaler.scale(loss).backward()
        self.shadow.deposit()
        return BatchMetrics(loss.detach(), metrics.correct)


@dataclass(frozen=True)
class Clip:
    """Scales the whole gradient down to the norm `norm`, in place, without waiting for the device."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    norm: float

    def __call__(self, work: Workspace) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.norm, foreach=True)


@dataclass(frozen=True)
class Update:
    """Updates the weights at the step's learning rate times each group's `lr_ratio`; on a GPU `DeviceBook` sets it."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lr: list[float]
    momentum: list[float] | None = None
    """The momentum of each step, where the schedule sets it."""

    def __call__(self, work: Workspace) -> None:
        if work.step is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr[work.step] * group["lr_ratio"]
                if self.momentum:
                    group["cycled"] = self.momentum[work.step]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Average:
    averages: Averages
    decays: Tensor | None
    """The step's decays, float32 (K,), where `DeviceBook` sets them."""

    def __call__(self, work: Workspace) -> None:
        self.averages.update(self.averages.decays[work.step] if self.decays is None else self.decays)


@dataclass(frozen=True)
class Totals:
    loss: float
    """Loss times the number of images, summed over the steps."""
    correct: float
    first_bad_step: int | None
    """The first step with a loss that is not finite."""


class Meter:
    """The `Totals` of an epoch, summed on the device, float64 (3,)."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        self.sums.zero_()
        self.sums[2].fill_(NEVER)

    def __call__(self, work: Workspace) -> None:
        loss, correct = given(work.metrics)
        self.sums[0].add_(loss.detach(), alpha=len(work.labels))
        self.sums[1].add_(correct)
        self.sums[2].clamp_(max=torch.where(loss.isfinite(), NEVER, float(given(work.step))))

    def read(self) -> Totals:
        """Reads the totals; waits for the device."""
        return totals(self.sums)


def totals(sums: Tensor) -> Totals:
    """Converts the sums of a `Meter`, float64 (3,)."""
    loss, correct, bad = sums.tolist()
    return Totals(loss, correct, None if bad == NEVER else int(bad))


class DeviceBook:
    """Keeps a step's number, learning rates and decays on a GPU, so that a captured step needs nothing from the host.

    Called at the end of a step, it adds the step to the meter and advances to the next, in one launch. The optimizer's
    groups get their rates as views of one tensor. `lr` holds one rate for each step; `decays`, float32 (S, K) on the
    device, the decays of the averages for each step, beside which the momentum of each step stands where it changes.
    """

    def __init__(
        self,
        meter: Meter,
        optimizer: torch.optim.Optimizer,
        lr: list[float],
        decays: Tensor,
        momentum: list[float] | None = None,
    ) -> None:
        self.sums, device = meter.sums, decays.device
        beside = [torch.tensor(momentum, device=device)[:, None]] if momentum else []
        self.table = torch.cat([decays, *beside], dim=1)
        self.lr_table = torch.tensor(lr, device=device)
        self.ratios = torch.tensor([group["lr_ratio"] for group in optimizer.param_groups], device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.rates, self.row = torch.zeros_like(self.ratios), torch.zeros_like(self.table[0])
        self.decays = self.row[: decays.size(1)]
        for group, rate in zip(optimizer.param_groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
            if momentum:
                group["cycled"] = self.row[-1]
        self.turn_to(0)

    def turn_to(self, step: int) -> None:
        self.number.fill_(step)
        set_rates_and_decays(self.number, self.rates, self.row, self.lr_table, self.ratios, self.table)

    def change_rates(self, lr: list[float], step: int) -> None:
        self.lr_table.copy_(torch.tensor(lr))
        self.turn_to(step)

    def __call__(self, work: Workspace) -> None:
        book = self.sums, self.number, self.rates, self.row
        loss, correct = given(work.metrics)
        advance_(*book, loss.detach(), correct, self.lr_table, self.ratios, self.table, len(work.labels))


class LiveMeter:
    """Reads a meter every `every` batches while steps are still running, without waiting for the device.

    On a GPU, a copy to pinned memory is queued behind the launched steps and read by a later call, once it has arrived,
    so a reading is some steps old. On a CPU there is nothing to wait for.
    """

    def __init__(self, meter: Meter, every: int = 16) -> None:
        self.sums, self.every = meter.sums, every
        on_gpu = self.sums.is_cuda
        self.host = torch.empty(3, dtype=torch.float64, pin_memory=True) if on_gpu else self.sums
        self.arrival = torch.cuda.Event() if on_gpu else None
        self.awaited: int | None = None
        """Steps that the copy under way covers."""

    def __call__(self, batch: int, steps: int) -> tuple[Totals, int] | None:
        """Returns totals that have arrived and the steps they cover; of `batch` batches, `steps` were launched."""
        if self.arrival is None:
            return (totals(self.sums), steps) if batch % self.every == 0 else None
        reading = None
        if self.awaited is not None and self.arrival.query():
            reading, self.awaited = (totals(self.host), self.awaited), None
        if self.awaited is None and batch % self.every == 0:
            self.host.copy_(self.sums, non_blocking=True)
            self.arrival.record()
            self.awaited = steps
        return reading

    def forget(self) -> None:
        """Discards a copy from an epoch that has ended."""
        self.awaited = None
