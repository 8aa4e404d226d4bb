"""Knowledge distillation: learning from the outputs of a trained network, or of an ensemble, as well as from the
labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.normalize import Normalizer
from fastcifar.errors import ConfigError
from fastcifar.inference.ensemble import joint_logits
from fastcifar.runs.network import load_networks


@dataclass(frozen=True)
class Teacher:
    """A trained network, or several, in eval mode, each with its own preprocessing."""

    members: tuple[tuple[nn.Module, Normalizer], ...]

    @torch.no_grad()
    def __call__(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images uint8 (N, 3, H, W), given to the networks in `dtype` -> logits (N, classes); of several, of the
        mean probabilities.
        """
        return joint_logits([network(normalize(images, dtype)) for network, normalize in self.members])


def load_teacher(path: Path, device: torch.device, classes: tuple[str, ...]) -> Teacher:
    """The network of a run's folder, with its best weights on the validation split, or else an average, where it keeps
    one.

    Of an ensemble's folder, the members that vote: those chosen on the validation split, or else all.

    Raises:
        FastcifarError: the folder is neither, or a run has no checkpoint; ConfigError: one knows other classes than
        `classes`.
    """
    networks = load_networks(path, device)
    for network in networks:
        if network.classes != classes:
            raise ConfigError(
                f"the teacher {network.path} was trained on other classes; give a run on the same data set."
            )
        network.model.requires_grad_(False)
    return Teacher(tuple((network.model, Normalizer(network.normalization, device)) for network in networks))


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence of the softened outputs, in float32, as a loss of the student's logits: (N, classes) twice -> ().

    KL(teacher || student) of logits over `temperature`, times its square, which keeps the gradient's size whatever the
    temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).
    """
    log_p, log_q = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
