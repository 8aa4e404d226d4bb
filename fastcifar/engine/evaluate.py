"""How good the weights are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcifar.augment.normalize import Normalization, Normalizer
from fastcifar.data.image_set import ImageSet
from fastcifar.device import Precision
from fastcifar.engine.compile import Record, Replay
from fastcifar.engine.objective import cross_entropy

BATCH_SIZE = {"cpu": 250, "cuda": 2000}


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set."""

    loss: float
    accuracy: float
    """As a fraction."""


class Evaluator:
    """Evaluates `model`, whatever weights it holds.

    Args:
        model: the network, on `device`.
        normalization: of its input.
        precision: of its convolutions.
        device: where the data sets are, too.
        batch: most images at once; what suits the device by default.
    """

    def __init__(
        self,
        model: nn.Module,
        normalization: Normalization,
        precision: Precision,
        device: torch.device,
        batch: int | None = None,
    ) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.normalize = Normalizer(normalization, device)
        self.size = min(batch or BATCH_SIZE[device.type], BATCH_SIZE[device.type])
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.replay: Replay | None = None

    def __call__(self, dataset: ImageSet) -> Evaluation:
        """Loss and accuracy over `dataset`; the model's mode is left as it was. Waits for the device, once."""
        training = self.model.training
        self.model.eval()
        self.sums.zero_()
        for images, labels in zip(dataset.images.split(self.size), dataset.labels.split(self.size), strict=True):
            if self.replay and len(labels) == self.size:
                self.images.copy_(images)
                self.labels.copy_(labels)
                self.replay()
            else:
                self.add(images, labels)
        self.model.train(training)
        loss, correct = self.sums.tolist()
        return Evaluation(loss / len(dataset), correct / len(dataset))

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """Adds a batch to the sums: images uint8 (N, H, W, 3), labels int64 (N,)."""
        with self.precision.autocast(self.device):
            logits = self.model(self.normalize(images.permute(0, 3, 1, 2), self.precision.dtype))
        self.sums[0] += cross_entropy(logits, labels) * len(labels)
        self.sums[1] += (logits.argmax(dim=1) == labels).sum()

    def capture(self, image_size: tuple[int, int], record: Record) -> None:
        """Records a full batch of images (height, width), to be launched whole from now on."""
        self.images = torch.zeros((self.size, *image_size, 3), dtype=torch.uint8, device=self.device)
        self.labels = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        training = self.model.training
        self.model.eval()
        self.add(self.images, self.labels)
        self.replay = record(lambda: self.add(self.images, self.labels))
        self.model.train(training)
