"""The appliers through their CUDA branches, on the pretended GPU; DALI by its real graphs."""

import pytest
import torch

from fastcifar.augment import dali_apply
from fastcifar.data.image_set import ImageSet
from fastcifar.data.loader import Loader
from fastcifar.errors import ConfigError

EVERYTHING = "standard,autoaugment,greyscale:0.2,cutout:1x8,cutmix"


def dataset() -> ImageSet:
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet.of(images, torch.arange(40) % 5)


def images_of(loader: Loader, epoch: int) -> torch.Tensor:
    return torch.cat([images for images, _ in loader.batches(epoch)])


@pytest.mark.parametrize(
    ("backend", "policy", "dtype"),
    [
        ("dali", "standard", torch.float16),
        ("dali", "transform2_reflect", torch.bfloat16),
        ("dali", EVERYTHING, torch.float32),
        ("triton", EVERYTHING, torch.uint8),
    ],
)
def test_a_steady_epoch_gives_the_images_of_a_cpu(gpu, dali, backend, policy, dtype):
    options = {"dtype": dtype, "batch_size": 10, "chunk_size": 20}
    loader = Loader(dataset(), policy, backend, device="cuda", **options)
    first = images_of(loader, 0)
    with gpu.steady():
        second = images_of(loader, 1)
    assert second.is_cuda
    reference = Loader(dataset(), policy, "torch", device="cpu", **options)
    rtol = 0.01 if dtype == torch.bfloat16 else 2e-3
    for epoch, images in enumerate((first, second)):
        torch.testing.assert_close(
            images.cpu(), images_of(reference, epoch), rtol=rtol, atol=0 if dtype == torch.uint8 else 2e-6
        )


def test_an_epoch_that_was_left_midway_does_not_spoil_the_next(gpu, dali):
    loader = Loader(dataset(), EVERYTHING, "dali", batch_size=10, chunk_size=20, device="cuda", dtype=torch.uint8)
    next(loader.batches(0))
    with gpu.steady():
        images = images_of(loader, 3)
    reference = Loader(dataset(), EVERYTHING, "torch", batch_size=10, device="cpu", dtype=torch.uint8)
    assert torch.equal(images.cpu(), images_of(reference, 3))


def test_dali_is_tried_on_a_device_without_a_number(gpu, dali):
    assert dali_apply.why_unusable(torch.device("cuda")) is None


def test_nothing_is_built_that_has_no_work(gpu, dali):
    built = Loader(dataset(), "standard,autoaugment", "dali", device="cuda", dtype=torch.uint8).applier
    assert built.first is not None
    assert built.last is None
    assert Loader(dataset(), "autoaugment", "dali", device="cuda", dtype=torch.float16).applier.first is None


def test_chunks_end_where_a_cuda_grid_does(gpu, dali):
    many = ImageSet.of(torch.zeros(70_000, 1, 1, 3, dtype=torch.uint8), torch.zeros(70_000))
    options = {"backend": "dali", "device": "cuda", "chunk_size": 70_000}
    assert Loader(many, "standard", batch_size=1000, **options).chunk_size == 65_000
    assert Loader(many, "standard,mixup", batch_size=1000, **options).chunk_size == 32_000
    with pytest.raises(ConfigError, match=r"at most 65535 images at once, not 66000 .* choose --loader triton\.$"):
        Loader(many, "standard", batch_size=66_000, **options)
