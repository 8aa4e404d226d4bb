"""Augmented, normalised float32 batches a second: the loader against what else there is, on one CPU core, or on the GPU
there is.

The rivals run in a `DataLoader`, as their documentation has it. kornia and albumentations come with `pip install
'.[bench]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from timing import measure, one_core
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastcifar.augment import BACKENDS
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader, dali_installed

BATCH_SIZE = 512
RIVAL_IMAGES = 2_000
POLICIES = ("standard", "standard,autoaugment_tv")
rates: dict[tuple[str, str], float] = {}
"""Images a second of the rivals, by name and policy."""


class Transformed(Dataset):
    """Images one at a time, through a transform, as `torchvision.datasets.CIFAR10` gives them."""

    def __init__(self, images: list[Any], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def torchvision_transform(images: ImageSet, policy: str) -> Callable[[Any], Tensor]:
    automatic = [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)] if "auto" in policy else []
    ending = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)]
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *automatic, *ending])


def pil(images: ImageSet, policy: str, count: int = RIVAL_IMAGES) -> Dataset:
    pictures = [Image.fromarray(image.numpy()) for image in images.images[:count]]
    return Transformed(pictures, images.labels[:count], torchvision_transform(images, policy))


def v2_tensors(images: ImageSet, policy: str) -> Dataset:
    tensors = list(images.images[:RIVAL_IMAGES].permute(0, 3, 1, 2).contiguous())
    return Transformed(tensors, images.labels[:RIVAL_IMAGES], torchvision_transform(images, policy))


def albumentations_images(images: ImageSet, policy: str) -> Dataset:
    library = pytest.importorskip("albumentations", reason="albumentations is not installed")
    if "auto" in policy:
        pytest.skip("albumentations has no AutoAugment")
    steps = [
        library.PadIfNeeded(40, 40, border_mode=0),
        library.RandomCrop(32, 32),
        library.HorizontalFlip(),
        library.Normalize(),
    ]
    transform = library.Compose(steps)
    arrays = list(images.images[:RIVAL_IMAGES].numpy())
    return Transformed(
        arrays,
        images.labels[:RIVAL_IMAGES],
        lambda image: torch.from_numpy(transform(image=image)["image"]).permute(2, 0, 1),
    )


RIVALS = {"torchvision_pil": pil, "torchvision_v2_tensor": v2_tensors, "albumentations": albumentations_images}


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rival", RIVALS)
def test_rival(benchmark, images, policy, rival):
    loader = DataLoader(RIVALS[rival](images, policy), BATCH_SIZE, shuffle=True)
    with one_core():
        median = measure(benchmark, lambda: [batch[0].shape for batch in loader], torch.device("cpu"), rounds=3)
    rates[rival, policy] = RIVAL_IMAGES / median
    benchmark.extra_info.update(policy=policy, device="cpu, one core", images_per_second=RIVAL_IMAGES / median)


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("policy", POLICIES)
def test_kornia(benchmark, images, policy):
    """Whole batches of float tensors, which is how kornia is meant to be used."""
    library = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    steps = [library.RandomCrop((32, 32), padding=4), library.RandomHorizontalFlip()]
    automatic = [library.auto.AutoAugment("cifar10")] if "auto" in policy else []
    transform = torch.nn.Sequential(
        *steps, *automatic, library.Normalize(torch.tensor(images.mean), torch.tensor(images.std))
    )
    batches = (images.images[:RIVAL_IMAGES].permute(0, 3, 1, 2).float() / 255).contiguous().split(BATCH_SIZE)
    with one_core():
        median = measure(
            benchmark, lambda: [transform(batch).shape for batch in batches], torch.device("cpu"), rounds=3
        )
    rates["kornia", policy] = RIVAL_IMAGES / median
    benchmark.extra_info.update(policy=policy, device="cpu, one core", images_per_second=RIVAL_IMAGES / median)


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loader(benchmark, images, device, copy_bandwidth, backend, policy):
    if backend == "dali" and not dali_installed():
        pytest.skip("NVIDIA DALI is not installed")
    with one_core():
        loader = Loader(images, policy, backend, BATCH_SIZE, device=device)
        median = measure(benchmark, lambda: [batch[0].shape for batch in loader], device)
    rate = len(images) / median
    bytes_moved = images.images[0].numel() * (1 + 4)
    benchmark.extra_info.update(
        policy=policy,
        device="cpu, one core" if device.type == "cpu" else torch.cuda.get_device_name(),
        images_per_second=rate,
        bytes_moved_per_image=bytes_moved,
        share_of_copy_bandwidth=rate * bytes_moved / copy_bandwidth,
        **{f"times_{rival}": rate / other for (rival, other_policy), other in rates.items() if other_policy == policy},
    )
