"""What is minimised."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from fastcifar.config import LossConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes) of any float dtype and labels, int64 (N,) or shares (N, classes) -> the mean loss, float32 ()."""


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy, in float32: logits (N, classes) of any float dtype, labels int64 (N,) or shares (N, classes)
    -> ().

    With `smoothing`, that share of each target is spread evenly over all classes (Szegedy et al. 2016,
    arXiv:1512.00567, section 7).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def asymmetric(
    logits: Tensor, labels: Tensor, gamma_pos: float = 0.0, gamma_neg: float = 4.0, smoothing: float = 0.1
) -> Tensor:
    """The single-label asymmetric loss, in float32: arguments and result as `cross_entropy`.

    A cross-entropy with smoothed targets whose terms are focused, (1 - p)^gamma_pos for the right class and p^gamma_neg
    for the others, so that wrong classes count only where they are likely (Ben-Baruch et al. 2021, arXiv:2009.14119, as
    their code applies it to one label; gradients flow through the focusing). Shares, as of mixed images, take both
    focusings in proportion.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    classes = log_p.shape[1]
    p, targets = log_p.exp(), F.one_hot(labels, classes).to(log_p.dtype) if labels.dim() == 1 else labels
    focus = targets * (1 - p) ** gamma_pos + (1 - targets) * p**gamma_neg
    return -((targets * (1 - smoothing) + smoothing / classes) * focus * log_p).sum(dim=1).mean()


def build_loss(config: LossConfig) -> Loss:
    """The loss that `config` names, without the teacher's part of it (`distill`)."""
    config = config.resolved
    smoothing = config.label_smoothing
    if config.loss == "asymmetric":
        return lambda logits, labels: asymmetric(logits, labels, config.gamma_pos, config.gamma_neg, smoothing)
    return lambda logits, labels: cross_entropy(logits, labels, smoothing)
