"""Augmented, normalised float32 batches a second: the loader against its rivals, on one CPU core or on a GPU.

kornia and albumentations come with `pip install '.[bench]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comparison import Transformed
from PIL import Image
from timing import measure, one_core
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from fastcifar.augment import BACKENDS
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader, dali_installed

BATCH_SIZE = 512
RIVAL_IMAGES = 2_000
POLICIES = ("standard", "standard,autoaugment_tv")
rates: dict[tuple[str, str], float] = {}
"""Images a second of the rivals, by name and policy."""

Epoch = Callable[[], object]
"""A call that goes through all images once."""


def data_loader(pictures: Sequence[Any], labels: Tensor, transform: Callable[[Any], Tensor]) -> Epoch:
    loader = DataLoader(Transformed(pictures, labels, transform), BATCH_SIZE, shuffle=True)
    return lambda: [batch.shape for batch, _ in loader]


def torchvision_transform(images: ImageSet, policy: str) -> Callable[[Any], Tensor]:
    automatic = [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)] if "auto" in policy else []
    ending = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)]
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *automatic, *ending])


def pil(images: ImageSet, policy: str) -> Epoch:
    pictures = [Image.fromarray(image.numpy()) for image in images.images]
    return data_loader(pictures, images.labels, torchvision_transform(images, policy))


def v2_tensors(images: ImageSet, policy: str) -> Epoch:
    tensors = list(images.images.permute(0, 3, 1, 2).contiguous())
    return data_loader(tensors, images.labels, torchvision_transform(images, policy))


def albumentations_images(images: ImageSet, policy: str) -> Epoch:
    library = pytest.importorskip("albumentations", reason="albumentations is not installed")
    if "auto" in policy:
        pytest.skip("albumentations has no AutoAugment")
    crop = [library.PadIfNeeded(40, 40, border_mode=0), library.RandomCrop(32, 32)]
    transform = library.Compose([*crop, library.HorizontalFlip(), library.Normalize()])

    def tensor(image: Any) -> Tensor:
        return torch.from_numpy(transform(image=image)["image"]).permute(2, 0, 1)

    return data_loader(list(images.images.numpy()), images.labels, tensor)


def kornia_batches(images: ImageSet, policy: str) -> Epoch:
    """Augments whole batches of float tensors, which is how kornia is meant to be used."""
    library = pytest.importorskip("kornia.augmentation", reason="kornia is not installed")
    automatic = [library.auto.AutoAugment("cifar10")] if "auto" in policy else []
    normalize = library.Normalize(torch.tensor(images.mean), torch.tensor(images.std))
    crop, flip = library.RandomCrop((32, 32), padding=4), library.RandomHorizontalFlip()
    transform = torch.nn.Sequential(crop, flip, *automatic, normalize)
    batches = (images.images.permute(0, 3, 1, 2).float() / 255).contiguous().split(BATCH_SIZE)
    return lambda: [transform(batch).shape for batch in batches]


RIVALS = {
    "torchvision_pil": pil,
    "torchvision_v2_tensor": v2_tensors,
    "albumentations": albumentations_images,
    "kornia": kornia_batches,
}


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rival", RIVALS)
def test_rival(benchmark, images, policy, rival):
    epoch = RIVALS[rival](images.subset(torch.arange(RIVAL_IMAGES)), policy)
    with one_core():
        rates[rival, policy] = RIVAL_IMAGES / measure(benchmark, epoch, torch.device("cpu"), rounds=3)
    benchmark.extra_info.update(policy=policy, device="cpu, one core", images_per_second=rates[rival, policy])


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loader(benchmark, images, device, copy_bandwidth, backend, policy):
    if backend == "dali" and not dali_installed():
        pytest.skip("NVIDIA DALI is not installed")
    with one_core():
        loader = Loader(images, policy, backend, BATCH_SIZE, device=device)
        rate = len(images) / measure(benchmark, lambda: [batch[0].shape for batch in loader], device)
    bytes_moved = images.images[0].numel() * (1 + 4)
    benchmark.extra_info.update(
        policy=policy,
        device="cpu, one core" if device.type == "cpu" else torch.cuda.get_device_name(),
        images_per_second=rate,
        bytes_moved_per_image=bytes_moved,
        share_of_copy_bandwidth=rate * bytes_moved / copy_bandwidth,
        **{f"times_{rival}": rate / other for (rival, other_policy), other in rates.items() if other_policy == policy},
    )
