"""Four loops that train the same network on the same images, at the same batch size and learning rates.

They are the reports' own, two that data on the device makes possible, and fastcifar. The first three are plain torch,
as their users would write and tune them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastcifar.config import AverageConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import find, load_dataset
from fastcifar.device import Precision, synchronize
from fastcifar.diagnostics.machine import usable_cpus
from fastcifar.engine.setup import prepare_machine, resolve
from fastcifar.engine.trainer import Trainer
from fastcifar.kernels.batch_norm import Skip
from fastcifar.models import build_model
from fastcifar.models.layers import BatchNorm2d, SqueezeExcite, add_and_activate, with_skip
from fastcifar.optim.schedules import lr_table
from fastcifar.runs.checkpoint import WEIGHTS

PADDING = 4


@dataclass(frozen=True)
class Task:
    config: RunConfig
    """The resolved configuration; it keeps no average of the weights, which the plain loops do not have."""
    train: ImageSet
    test: ImageSet

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.engine.device)


class PlainLoop(ABC):
    """A loop of SGD with Nesterov's momentum, the learning rates of `task` and, where `amp` is set, autocast."""

    amp = channels_last = compiled = fused = False

    def __init__(self, task: Task) -> None:
        config, self.task, self.device = task.config, task, task.device
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(config.seed)
        options = {"classes": len(task.train.classes), "image_size": task.train.images.shape[1], **config.model.options}
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model = in_plain_torch(build_model(config.model.arch, **options)).to(self.device, memory_format=layout)
        statistics = (task.train.mean, task.train.std)
        self.mean, self.std = (255 * torch.tensor(values, device=self.device) for values in statistics)
        self.network = torch.compile(self.model) if self.compiled else self.model
        optim, peak = config.optim.resolved, config.optim.peak_lr(config.batch_size)
        own = {"momentum": optim.momentum, "weight_decay": optim.weight_decay, "nesterov": True}
        # None lets torch choose; False would have it update one parameter after another.
        self.optimizer = torch.optim.SGD(self.model.parameters(), peak, fused=self.fused or None, **own)
        rates = lr_table(config.schedule, peak, len(task.train) // config.batch_size, config.epochs)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rates[min(step, len(rates) - 1)] / peak
        )
        self.precision = Precision(config.engine.precision if self.amp else "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields one epoch: normalised float images (B, 3, H, W) and labels int64 (B,), on the device."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.precision.autocast(self.device):
            return F.cross_entropy(self.network(images), labels)

    def prepare(self) -> None:
        """Compiles on black images; the weights and statistics stay as they are."""
        if not self.compiled:
            return
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        count, size = self.task.config.batch_size, self.task.train.images.shape[1:3]
        images = torch.zeros(count, *size, 3, device=self.device).permute(0, 3, 1, 2)
        self.loss(images, torch.zeros(count, dtype=torch.int64, device=self.device)).backward()
        self.optimizer.zero_grad()
        self.model.load_state_dict(kept)
        synchronize(self.device)

    def epoch(self) -> None:
        self.model.train()
        for images, labels in self.batches():
            loss = self.loss(images, labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
        synchronize(self.device)

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        correct, test = 0, self.task.test
        for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
            with self.precision.autocast(self.device):
                found = self.model(normalized(images.to(self.device), self.mean, self.std)).argmax(1)
            correct += int((found == labels.to(self.device)).sum())
        return correct / len(test)


class PlainNorm(BatchNorm2d):
    """The same layer by torch's own operators."""

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], residual: Tensor | None = None, skip: Skip | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = x[0] + x[1] if isinstance(x, tuple) else x
        return with_skip(add_and_activate(nn.BatchNorm2d.forward(self, x), residual, self.relu), x, skip)


def in_plain_torch(model: nn.Module) -> nn.Module:
    """Returns `model` itself, without the kernels its layers call on a GPU and the loops of a compiled CPU."""
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.__class__ = PlainNorm
        if isinstance(module, SqueezeExcite):
            raise TypeError("the plain loops have no squeeze-and-excitation; compare another network.")
    return model


class Transformed(Dataset):
    """Images one at a time through a transform, as `torchvision.datasets.CIFAR10` gives them."""

    def __init__(self, images: Sequence[Any], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class ReportsLoop(PlainLoop):
    """The loop of the reports: PIL transforms in a `DataLoader` on all cores, float32, eager."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        steps = [
            Image.fromarray,
            transforms.RandomCrop(task.train.images.shape[1:3], padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(task.train.mean, task.train.std),
        ]
        self.loader = DataLoader(
            Transformed(task.train.images.numpy(), task.train.labels, transforms.Compose(steps)),
            task.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=usable_cpus(),
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class EagerAmp(PlainLoop):
    """Autocast, eager, with the data set on the device, where whole batches are cropped and flipped."""

    amp = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.padded = F.pad(task.train.images, (0, 0, PADDING, PADDING, PADDING, PADDING)).to(self.device)
        self.labels = task.train.labels.to(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), device=self.device)
        for index in order.split(self.task.config.batch_size)[: len(order) // self.task.config.batch_size]:
            images = normalized(cropped_and_flipped(self.padded, index), self.mean, self.std)
            yield images if self.channels_last else images.contiguous(), self.labels[index]


class Compiled(EagerAmp):
    """`EagerAmp` as PyTorch's documentation speeds it up: compiled by default mode, channels_last, fused optimiser."""

    channels_last = compiled = fused = True


class Fastcifar:
    """fastcifar, by the calls that `fastcifar train` makes."""

    def __init__(self, task: Task) -> None:
        prepare_machine(task.config.engine)
        self.task, self.trainer = task, Trainer(task.config, task.train)

    def prepare(self) -> None:
        self.trainer.compile()
        self.trainer.capture()

    def epoch(self) -> None:
        self.trainer.run_epoch()

    def accuracy(self) -> float:
        return self.trainer.evaluate(self.task.test, self.trainer.state.last())[WEIGHTS].accuracy


LOOPS: dict[str, type[PlainLoop | Fastcifar]] = {
    "reports": ReportsLoop,
    "eager_amp": EagerAmp,
    "compiled": Compiled,
    "fastcifar": Fastcifar,
}
"""The loops in order; fastcifar comes last, since it sets the process up for itself."""


def cropped_and_flipped(padded: Tensor, index: Tensor) -> Tensor:
    """Cuts windows at random places of the images at `index`, and mirrors half of them.

    Padded images are uint8 (N, H + 2 * PADDING, W + 2 * PADDING, 3) and `index` is int64 (B,); the result is uint8 (B,
    H, W, 3).
    """
    count, (height, width) = len(index), (size - 2 * PADDING for size in padded.shape[1:3])
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1), device=padded.device)
    rows, columns = torch.arange(height, device=padded.device), torch.arange(width, device=padded.device)
    mirrored = torch.rand(count, 1, device=padded.device) < 0.5
    columns = torch.where(mirrored, columns.flip(0), columns)
    return padded[index[:, None, None], (top + rows)[:, :, None], (left + columns)[:, None, :]]


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turns uint8 (B, H, W, 3) into float32 (B, 3, H, W) in channels_last; mean and std, (3,), are in grey levels."""
    return ((images - mean) / std).permute(0, 3, 1, 2)


def task_for(device: str, batch_size: int = 128, *, smoke: bool = False) -> Task:
    """Returns the comparison that suits a device ("cuda" or "cpu").

    On a GPU it is `resnet_prop`, on CIFAR-10 where that is at hand; on a CPU it is what takes minutes. The learning
    rate goes with the batch size. With `smoke` a small network is trained for only as long as shows that all loops run.
    """
    on_gpu = device != "cpu"
    dataset = "cifar10" if on_gpu and not smoke and find("cifar10") else "synthetic"
    train, test = load_dataset(dataset, "train"), load_dataset(dataset, "test")
    if smoke:
        train, test = train.subset(torch.arange(min(96, len(train)))), test.subset(torch.arange(min(64, len(test))))
    small = ModelConfig("resnet", blocks=(1, 1), channels=(8, 16))
    config, _ = resolve(
        RunConfig(
            small if smoke else ModelConfig("resnet_prop" if on_gpu else "resnet20_v2"),
            DataConfig(dataset),
            OptimConfig(scale_lr="linear"),
            average=AverageConfig(ema_decay=(0.0,)),
            engine=EngineConfig(device, compile="off" if smoke else "on"),
            epochs=1 if smoke else 10 if on_gpu else 4,
            batch_size=batch_size,
        )
    )
    return Task(config, train, test)
