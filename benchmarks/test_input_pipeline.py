"""Augmented, normalised batches a second and core: the loader against torchvision's PIL transforms in a DataLoader."""

from __future__ import annotations

import pytest
import torch
from conftest import measure, one_core
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastcifar.augment import BACKENDS
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader, dali_installed

BATCH_SIZE = 512
torchvision_rate: dict[str, float] = {}


class PilImages(Dataset):
    """What `torchvision.datasets.CIFAR10` is: PIL images, transformed one at a time."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images = [Image.fromarray(image.numpy()) for image in images.images[:count]]
        self.labels = images.labels[:count].tolist()
        normalise = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)])
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), normalise])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


@pytest.mark.benchmark(group="input pipeline, standard, float32")
def test_torchvision_pil(benchmark, images):
    count = 2_000
    loader = DataLoader(PilImages(images, count), BATCH_SIZE, shuffle=True)
    with one_core():
        median = measure(benchmark, lambda: [batch[0].shape for batch in loader], torch.device("cpu"), rounds=3)
    torchvision_rate["standard"] = count / median
    benchmark.extra_info.update(device="cpu, one core", images_per_second=count / median)


@pytest.mark.benchmark(group="input pipeline, standard, float32")
@pytest.mark.parametrize("backend", BACKENDS)
def test_loader(benchmark, images, device, copy_bandwidth, backend):
    if backend == "dali" and not dali_installed():
        pytest.skip("NVIDIA DALI is not installed")
    with one_core():
        loader = Loader(images, "standard", backend, BATCH_SIZE, device=device)
        median = measure(benchmark, lambda: [batch[0].shape for batch in loader], device)
    rate = len(images) / median
    floor = copy_bandwidth / (32 * 32 * 3 * (1 + 4))
    benchmark.extra_info.update(
        device="cpu, one core" if device.type == "cpu" else torch.cuda.get_device_name(),
        images_per_second=rate,
        share_of_copy_bandwidth=rate / floor,
        times_torchvision_pil=rate / torchvision_rate["standard"] if torchvision_rate else None,
    )
