"""Knowledge distillation: learning from the outputs of a trained network as well as from the labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalizer
from fastcifar.errors import ConfigError
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


def load_teacher(run: Path, device: torch.device, classes: tuple[str, ...]) -> Teacher:
    """The network of the folder `run`, with its best weights on the validation split, or else an average, where it keeps one.

    Raises:
        FastcifarError: the folder is no run, or has no checkpoint; ConfigError: it knows other classes than `classes`.
    """
    network = load_network(run, device)
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
