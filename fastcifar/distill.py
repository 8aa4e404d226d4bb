"""Knowledge distillation: learning from the outputs of a trained network, or of an ensemble, as well as from the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalizer
from fastcifar.errors import ConfigError
from fastcifar.runs.ensembles import is_ensemble, voters
from fastcifar.runs.network import load_network


@dataclass(frozen=True)
class Teacher:
    """A trained network, in eval mode, with its own preprocessing."""

    network: nn.Module
    normalize: Normalizer

    @torch.no_grad()
    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images uint8 (N, 3, H, W), given to the network in `dtype` -> logits (N, classes)."""
        return self.network(self.normalize(images, dtype))


@dataclass(frozen=True)
class Committee:
    """Several teachers as one."""

    members: tuple[Teacher, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images as a teacher's -> the logarithm of the members' mean probabilities, float32 (N, classes), which are logits of the mean."""
        shares = torch.stack([F.log_softmax(member(images, dtype).float(), dim=1) for member in self.members])
        return shares.logsumexp(dim=0) - math.log(len(self.members))


def load_teacher(path: Path, device: torch.device, classes: tuple[str, ...]) -> Teacher | Committee:
    """The network of a run's folder, with its best weights on the validation split, or else an average, where it keeps one.

    Of an ensemble's folder, the members that vote: those chosen on the validation split, or else all.

    Raises:
        FastcifarError: the folder is neither, or a run has no checkpoint; ConfigError: one knows other classes than `classes`.
    """
    if not is_ensemble(path):
        return load_one(path, None, device, classes)
    return Committee(tuple(load_one(run, weights, device, classes) for run, weights in voters(path)))


def load_one(run: Path, which: str | None, device: torch.device, classes: tuple[str, ...]) -> Teacher:
    """The weights `which` of a run, as `runs.network.load_network` has them, no longer to be trained. Raises as `load_teacher`."""
    network = load_network(run, device, which)
    if network.classes != classes:
        raise ConfigError(f"the teacher {run} was trained on other classes; give a run on the same data set.")
    for parameter in network.model.parameters():
        parameter.requires_grad_(False)
    return Teacher(network.model, Normalizer(network.normalization, device))


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence of the softened outputs, in float32, as a loss of the student's logits: (N, classes) twice -> ().

    KL(teacher || student) of logits over `temperature`, times its square, which keeps the gradient's size whatever the temperature (Hinton
    et al. 2015, arXiv:1503.02531, section 2).
    """
    log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
