"""A batch in several passes: the memory of one, the gradient of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcifar.engine.objective import Outcome
from fastcifar.engine.shadow import Shadow
from fastcifar.engine.step import Workspace


@dataclass(frozen=True)
class SlicedPass:
    """`Forward` and `Backward` in one, over `micro_batch` images at a time, the last pass having the fewer that remain.

    Gradients add up to those of the mean loss over the whole batch, so the update is the same but for the order of
    summation. Where a network has batch norm, each pass is normalised by its own statistics, and its running statistics
    move once a pass: as if so many GPUs had shared the batch. Nothing waits for the device, and every pass of the same
    size is the same graph.
    """

    objective: Callable[[Tensor, Tensor], Outcome]
    scaler: torch.amp.GradScaler
    shadow: Shadow
    micro_batch: int

    def __call__(self, work: Workspace) -> None:
        """Leaves the gradients, and the mean loss of the batch and its right answers as Forward does; of the loss
        nothing more is due.
        """
        self.shadow.refresh()
        slices = zip(work.images.split(self.micro_batch), work.labels.split(self.micro_batch), strict=True)
        loss, correct = map(sum, zip(*(self.pass_over(*part, len(work.labels)) for part in slices), strict=True))
        work.loss = loss
        work.outcome = work.outcome or Outcome(loss, correct)

    def pass_over(self, images: Tensor, labels: Tensor, count: int) -> Outcome:
        """Adds the gradient of a slice of `count` images; returns its part of the batch's mean loss, detached, and
        its right answers.
        """
        outcome = self.objective(images, labels)
        loss = outcome.loss * (len(labels) / count)
        self.scaler.scale(loss).backward()
        self.shadow.deposit()
        return Outcome(loss.detach(), outcome.correct)
