"""How good the weights are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastcifar.augment.normalize import Normalization, Normalizer
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.precision import Precision
from fastcifar.losses import cross_entropy

BATCH_SIZE = {"cpu": 250, "cuda": 2000}


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set."""

    loss: float
    accuracy: float
    """As a fraction."""


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: ImageSet, normalization: Normalization, precision: Precision) -> Evaluation:
    """Loss and accuracy of `model`, on the device where it and `dataset` are; the model's mode is left as it was."""
    device = dataset.images.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    normalize = Normalizer(normalization, device)
    size = BATCH_SIZE[device.type]
    for images, labels in zip(dataset.images.split(size), dataset.labels.split(size), strict=True):
        with precision.autocast(device):
            logits = model(normalize(images.permute(0, 3, 1, 2), precision.dtype))
        sums[0] += cross_entropy(logits, labels) * len(labels)
        sums[1] += (logits.argmax(dim=1) == labels).sum()
    model.train(training)
    loss, correct = sums.tolist()
    return Evaluation(loss / len(dataset), correct / len(dataset))
