"""Measures the loss and accuracy of a network's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcifar.data.image_set import ImageSet
from fastcifar.engine.compile import Record, Replay
from fastcifar.engine.objective import ForwardPass, cross_entropy

BATCH_SIZE = {"cpu": 250, "cuda": 2000}


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over a data set; the accuracy is a fraction."""

    loss: float
    accuracy: float


class Evaluator:
    """Evaluates a network on at most `batch_size` images at once; by default as many as suit the device."""

    def __init__(self, forward: ForwardPass, batch_size: int | None = None) -> None:
        self.forward = forward
        largest = BATCH_SIZE[forward.device.type]
        self.batch_size = min(batch_size or largest, largest)
        self.sums = torch.zeros(2, dtype=torch.float64, device=forward.device)
        self.replay: Replay | None = None

    def __call__(self, dataset: ImageSet) -> Evaluation:
        """Evaluates the model on `dataset`, and leaves its mode as it was. Waits for the device once."""
        model = self.forward.model
        training = model.training
        model.eval()
        self.sums.zero_()
        batches = dataset.images.split(self.batch_size), dataset.labels.split(self.batch_size)
        for images, labels in zip(*batches, strict=True):
            if self.replay and len(labels) == self.batch_size:
                self.images.copy_(images)
                self.labels.copy_(labels)
                self.replay()
            else:
                self.add(images, labels)
        model.train(training)
        loss, correct = self.sums.tolist()
        return Evaluation(loss / len(dataset), correct / len(dataset))

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """Adds a batch to the sums: images uint8 (N, H, W, 3), labels int64 (N,)."""
        logits = self.forward(images.permute(0, 3, 1, 2))
        self.sums[0] += cross_entropy(logits, labels) * len(labels)
        self.sums[1] += (logits.argmax(dim=1) == labels).sum()

    def capture(self, image_size: tuple[int, int], record: Record) -> None:
        """Captures a full batch of images (height, width), to be launched as a whole from now on."""
        device = self.forward.device
        self.images = torch.zeros((self.batch_size, *image_size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        training = self.forward.model.training
        self.forward.model.eval()
        self.add(self.images, self.labels)
        self.replay = record(lambda: self.add(self.images, self.labels))
        self.forward.model.train(training)
