"""The forward pass of training, from bytes to the loss; compiled as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcifar.augment.normalize import Normalization, Normalizer
from fastcifar.config import LossConfig
from fastcifar.distill import Teacher, distillation, load_teacher
from fastcifar.engine.precision import Precision
from fastcifar.losses import build_loss


class Outcome(NamedTuple):
    """What came of a batch; both ()."""

    loss: Tensor
    """Mean, float32."""
    correct: Tensor
    """Number of right answers."""


class Objective:
    """What a step minimises.

    Args:
        model: the network.
        normalization: of its input.
        precision: of its convolutions.
        loss: of its logits.
        device: where it computes.
        classes: names of the classes, which must be the teacher's too.
        weights: of `model`, by name, to be used in place of its own.

    Raises:
        FastcifarError: the teacher cannot be read, or knows other classes.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        precision: Precision,
        loss: LossConfig,
        device: torch.device,
        classes: tuple[str, ...],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights = dict(weights or {})
        self.model, self.precision, self.device = model, precision, device
        self.normalize = Normalizer(normalization, device)
        self.loss, self.criterion = loss.resolved, build_loss(loss)
        self.teacher: Teacher | None = load_teacher(loss.teacher, device, classes) if loss.teacher else None

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        """Images uint8 (B, 3, H, W); labels int64 (B,), or float32 (B, classes) of mixed images, whose answer is the
        larger share.
        """
        with self.precision.autocast(self.device):
            logits = self.logits(images)
            taught = self.teacher(images, self.precision.dtype) if self.teacher else None
        loss = self.criterion(logits, labels)
        if taught is not None:
            loss = torch.lerp(loss, distillation(logits, taught, self.loss.temperature), self.loss.distill_weight)
        hard = labels if labels.dim() == 1 else labels.argmax(dim=1)
        return Outcome(loss, (logits.detach().argmax(dim=1) == hard).sum())

    def logits(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) -> (B, classes)."""
        return functional_call(self.model, self.weights, self.normalize(images, self.precision.dtype))
