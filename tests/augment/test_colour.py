"""The operations that move no pixel, against PIL: no difference is allowed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.augment.automatic import ENHANCING, GEOMETRIC, Operation
from fastcifar.augment.colour import apply_operation
from fastcifar.kernels.augment import greyscale_reference

WITH_PIL: dict[Operation, Callable[[Image.Image, float], Image.Image]] = {
    Operation.IDENTITY: lambda image, value: image,
    Operation.AUTO_CONTRAST: lambda image, value: ImageOps.autocontrast(image),
    Operation.INVERT: lambda image, value: ImageOps.invert(image),
    Operation.EQUALIZE: lambda image, value: ImageOps.equalize(image),
    Operation.SOLARIZE: ImageOps.solarize,
    Operation.POSTERIZE: lambda image, bits: (
        ImageOps.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)
    ),
    Operation.CONTRAST: lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    Operation.COLOR: lambda image, value: ImageEnhance.Color(image).enhance(value),
    Operation.BRIGHTNESS: lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    Operation.SHARPNESS: lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
}
# As torchvision computes them: 1 plus what it draws.
FACTORS = [1.0 + strength for strength in (-1.0, -0.95, -0.9, -0.5, 0.0, 0.3, 0.9, 0.99)]
THRESHOLDS = [0.0, 0.5, 1.0, 8.5, 127.0, 127.5, 128.0, 246.5, 254.0, 254.5, 255.0, 255.5, 256.0]
VALUES = {operation: FACTORS for operation in ENHANCING} | {
    Operation.SOLARIZE: THRESHOLDS,
    Operation.POSTERIZE: [float(i) for i in range(9)],
}
COLOUR = sorted(set(Operation) - GEOMETRIC)
SHAPES = [(33, 31), (5, 7), (2, 3), (1, 1)]


def pictures(shape: tuple[int, int]) -> Tensor:
    """Draws uint8 (N, H, W, 3): noise, constants, few levels, gradients, black and white, colours close to clipping."""
    generator, size = np.random.default_rng(0), (*shape, 3)
    gradient = np.linspace(0, 255, shape[0] * shape[1] * 3).reshape(size)
    made = [
        *generator.integers(0, 256, (4, *size)),
        *(np.full(size, level) for level in (0, 1, 127, 255)),
        np.broadcast_to([3, 128, 250], size),
        *(np.where(generator.random(size) < 0.5, *levels) for levels in ((0, 255), (90, 91), (17, 201))),
        *(np.where(generator.random(size) < share, 40, generator.integers(0, 256, size)) for share in (0.5, 0.9)),
        *(generator.integers(low, high, size) for low, high in ((100, 110), (0, 3), (253, 256))),
        *(gradient, np.broadcast_to(gradient[:, :, :1], size)),
        *(generator.binomial(255, share, size) for share in (0.1, 0.5, 0.9)),
    ]
    return torch.from_numpy(np.stack(made).astype(np.uint8))


def assert_equal(images: Tensor, operation: Operation, value: Tensor) -> None:
    pairs = zip(images.numpy(), value.tolist(), strict=True)
    expected = np.stack([np.asarray(WITH_PIL[operation](Image.fromarray(image), number)) for image, number in pairs])
    difference = np.abs(apply_operation(images, operation, value).numpy().astype(int) - expected)
    assert not difference.any(), f"{np.count_nonzero(difference)} bytes differ, by {difference.max()} at most"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", COLOUR, ids=lambda operation: operation.name)
def test_equals_pil(operation, shape):
    values = VALUES.get(operation, [0.0])
    images = pictures(shape)
    value = torch.tensor(values, dtype=torch.float64).repeat(len(images))
    assert_equal(images.repeat_interleave(len(values), dim=0), operation, value)


@pytest.mark.parametrize("operation", sorted(VALUES), ids=lambda operation: operation.name)
def test_equals_pil_at_every_level_and_any_value(operation):
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    images = torch.cat((levels, levels.flip(1), levels.roll(77, 2)), dim=3).repeat(500, 1, 1, 1)
    share = torch.rand(500, generator=generator, dtype=torch.float64)
    of_share = {Operation.SOLARIZE: 256 * share, Operation.POSTERIZE: (1 + 8 * share).floor()}
    assert_equal(images, operation, of_share.get(operation, 2 * share))


def test_auto_contrast_stretches_any_range_as_pil_does():
    low, high = np.sort(np.random.default_rng(0).integers(0, 256, (2, 600, 1, 1, 3)), axis=0)
    levels = np.clip(np.arange(256).reshape(1, 1, 256, 1), low, high).astype(np.uint8)
    assert_equal(torch.from_numpy(levels), Operation.AUTO_CONTRAST, torch.zeros(600, dtype=torch.float64))


@pytest.mark.parametrize("dark", [0, 1, 254, 255, 382, 383, 509, 510, 637, 638, 1023])
def test_equalize_with_few_or_many_pixels_below_the_lightest(dark):
    """Steps are 0 (nothing changes) and 1 to 4, and some tables run past 255."""
    images = torch.full((3, 1024, 3), 200, dtype=torch.uint8)
    images[0, :dark], images[1, :dark, 1], images[2, : dark // 2] = 7, 30, 9
    assert_equal(images.view(3, 32, 32, 3), Operation.EQUALIZE, torch.zeros(3, dtype=torch.float64))


def test_greyscale_equals_pil_for_all_colours():
    plane = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 2).view(256, 256, 2)
    for red in range(0, 256, 8):
        reds = torch.arange(red, red + 8, dtype=torch.uint8)[:, None, None, None].expand(8, 256, 256, 1)
        images = torch.cat((reds, plane.expand(8, 256, 256, 2)), dim=3)
        expected = np.asarray(Image.fromarray(images.reshape(2048, 256, 3).numpy()).convert("L"))
        grey = greyscale_reference(images, torch.ones(8, dtype=torch.bool)).reshape(2048, 256, 3)
        assert all(np.array_equal(grey[..., channel], expected) for channel in range(3))


@pytest.mark.parametrize("operation", COLOUR, ids=lambda operation: operation.name)
@pytest.mark.parametrize("count", [0, 5])
def test_inputs_stay_and_the_result_is_new(operation, count):
    images, value = pictures((32, 32))[:count], torch.ones(count, dtype=torch.float64)
    before = images.clone()
    result = apply_operation(images, operation, value)
    assert torch.equal(images, before)
    assert bool((value == 1).all())
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    assert result.is_contiguous()
    assert not count or result.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


class Sums(TorchDispatchMode):
    """Notes the dtypes of cumulative sums."""

    dtypes = ()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.cumsum.default:
            self.dtypes += (arguments[0].dtype,)
        return function(*arguments, **(options or {}))


def test_equalize_sums_whole_numbers_as_a_gpu_does_only_these_deterministically():
    with Sums() as sums:
        apply_operation(pictures((5, 7))[:1], Operation.EQUALIZE, torch.zeros(1, dtype=torch.float64))
    assert sums.dtypes == (torch.int32,)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", COLOUR, ids=lambda operation: operation.name)
def test_on_the_gpu_the_same_without_waiting_for_it(operation):
    values = VALUES.get(operation, [0.0])
    images = pictures((32, 32)).repeat_interleave(len(values), dim=0)
    value = torch.tensor(values, dtype=torch.float64).repeat(len(images) // len(values))
    expected = apply_operation(images, operation, value)
    images, value_there = images.cuda(), value.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [apply_operation(images, operation, amount) for amount in (value, value_there)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(result.cpu(), expected) for result in results)
