"""The forward pass of training, from bytes to the loss, including a teacher's part; compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalization, Normalizer
from fastcifar.checks import given
from fastcifar.config import LossConfig
from fastcifar.device import Precision
from fastcifar.errors import ConfigError
from fastcifar.runs.network import LoadOptions, joint_logits, load_networks


class BatchMetrics(NamedTuple):
    """Mean loss of a batch, float32 (), and the number of its correct answers, int64 ()."""

    loss: Tensor
    correct: Tensor


class ForwardPass:
    """Normalises images and runs a network on them in `precision` on `device`."""

    def __init__(
        self, model: nn.Module, normalization: Normalization, precision: Precision, device: torch.device
    ) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.normalize = Normalizer(normalization, device)

    def __call__(self, images: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Images uint8 (B, 3, H, W) -> logits (B, classes); `weights`, by name, replace the model's own."""
        with self.precision.autocast(self.device):
            return functional_call(self.model, weights or {}, self.normalize(images, self.precision.dtype))


class Objective:
    """A step's objective: the `loss` of a network's logits, with `weights`, by name, in place of its own.

    Raises FastcifarError where a teacher cannot be read, knows other classes than `classes`, or needs code and `trust`
    is not given.
    """

    def __init__(
        self,
        forward: ForwardPass,
        loss: LossConfig,
        classes: tuple[str, ...],
        weights: dict[str, Tensor] | None = None,
        trust: bool = False,
    ) -> None:
        self.forward, self.weights = forward, dict(weights or {})
        self.loss, self.criterion = loss.resolved, build_loss(loss)
        self.teacher = load_teacher(loss.teacher, forward.device, classes, trust) if loss.teacher else None

    def __call__(self, images: Tensor, labels: Tensor) -> BatchMetrics:
        """Images uint8 (B, 3, H, W); labels int64 (B,), or shares float32 (B, classes), the largest of them correct."""
        logits = self.logits(images)
        loss = self.criterion(logits, labels)
        if self.teacher:
            precision = self.forward.precision
            with precision.autocast(self.forward.device):
                taught = self.teacher(images, precision.dtype)
            temperature, weight = given(self.loss.temperature), given(self.loss.distill_weight)
            loss = torch.lerp(loss, distillation(logits, taught, temperature), weight)
        hard = labels if labels.dim() == 1 else labels.argmax(dim=1)
        return BatchMetrics(loss, (logits.detach().argmax(dim=1) == hard).sum())

    def logits(self, images: Tensor) -> Tensor:
        return self.forward(images, self.weights)


Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes) of any float dtype and labels, int64 (N,) or shares (N, classes) -> the mean loss, float32 ()."""


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Computes the mean cross-entropy, as a `Loss`, with the share `smoothing` of each target spread over all classes.

    See Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def asymmetric(logits: Tensor, labels: Tensor, gamma_pos: float, gamma_neg: float, smoothing: float) -> Tensor:
    """Computes the single-label asymmetric loss, as a `Loss`.

    It is a cross-entropy with smoothed targets whose terms are focused, (1 - p)^gamma_pos for the right class and
    p^gamma_neg for the others, so that wrong classes count only where they are likely (Ben-Baruch et al. 2021,
    arXiv:2009.14119, as their code applies it to one label; gradients flow through the focusing). The shares of mixed
    images take both focusings in proportion.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    classes = log_p.shape[1]
    p, targets = log_p.exp(), F.one_hot(labels, classes).to(log_p.dtype) if labels.dim() == 1 else labels
    focus = targets * (1 - p) ** gamma_pos + (1 - targets) * p**gamma_neg
    return -((targets * (1 - smoothing) + smoothing / classes) * focus * log_p).sum(dim=1).mean()


def build_loss(config: LossConfig) -> Loss:
    config = config.resolved
    smoothing = given(config.label_smoothing)
    if config.loss == "asymmetric":
        gamma_pos, gamma_neg = given(config.gamma_pos), given(config.gamma_neg)
        return lambda logits, labels: asymmetric(logits, labels, gamma_pos, gamma_neg, smoothing)
    return lambda logits, labels: cross_entropy(logits, labels, smoothing)


@dataclass(frozen=True)
class Teacher:
    """One or more trained networks in eval mode, each with its own preprocessing."""

    members: tuple[tuple[nn.Module, Normalizer], ...]

    @torch.no_grad()
    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images uint8 (N, 3, H, W), fed in `dtype` -> logits (N, classes), of several networks the joint ones."""
        return joint_logits([network(normalize(images, dtype)) for network, normalize in self.members])


def load_teacher(path: Path, device: torch.device, classes: tuple[str, ...], trust: bool = False) -> Teacher:
    """Loads the network of a run's folder (see `runs.network.load_networks` for its weights), or an ensemble's voters.

    Raises FastcifarError where the folder is neither, has no checkpoint, or needs code and `trust` is not given;
    ConfigError where its classes differ.
    """
    networks = load_networks(path, device, LoadOptions(trust=trust))
    for network in networks:
        if network.classes != classes:
            raise ConfigError(
                f"the teacher {network.path} was trained on other classes; give a run on the same data set."
            )
        network.model.requires_grad_(False)
    return Teacher(tuple((network.model, Normalizer(network.normalization, device)) for network in networks))


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Computes the distillation loss of student and teacher logits, (N, classes) each -> the mean, float32 ().

    It is KL(teacher || student) of logits over `temperature`, times its square, which keeps the gradient's size
    whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).
    """
    log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
