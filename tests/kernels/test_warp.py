"""The warp's reference against PIL and numpy, and its short cut for shifts against itself."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcifar.augment import geometry
from fastcifar.kernels.warp import ONE, resample, warp_reference, whole_pixels

SIZES = ((1, 1), (5, 8), (32, 32), (33, 31))
MEAN = (125, 123, 114)


def random_images(count: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def shifts_and_mirrors(count: int, size: tuple[int, int], reach: int = 4, seed: int = 0) -> Tensor:
    """Draws maps that shift and mirror: float64 (N, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(-reach, reach + 1, (2, count), generator=generator).double()
    return geometry.translation(x, y) @ geometry.mirror(torch.rand(count, generator=generator) < 0.5, size[1])


def random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Draws crops, mirrors, rotations and shears: float64 (N, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    angle, slant, tilt = torch.rand(3, count, dtype=torch.float64, generator=generator) * 2 - 1
    centre = (size[1] / 2, size[0] / 2)
    maps = [
        shifts_and_mirrors(count, size, seed=seed),
        geometry.shear(slant, tilt, centre),
        geometry.rotation(angle * 180, centre),
    ]
    return reduce(torch.matmul, maps)


def pil_transform(images: Tensor, maps: Tensor, resampling: Image.Resampling, colour: tuple[int, int, int]) -> Tensor:
    results = []
    for image, matrix in zip(images, maps, strict=True):
        picture = Image.fromarray(image.numpy())
        six = matrix[:2].flatten().tolist()
        results.append(
            np.array(picture.transform(picture.size, Image.Transform.AFFINE, six, resampling, fillcolor=colour))
        )
    return torch.from_numpy(np.stack(results))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [random_maps, shifts_and_mirrors])
def test_nearest_is_that_of_pil(size: tuple[int, int], kind: Any) -> None:
    images, maps = random_images(300, size), kind(300, size)
    expected = pil_transform(images, maps, Image.Resampling.NEAREST, MEAN)
    warp = geometry.fixed_point(maps).to(torch.int32)
    assert torch.equal(warp_reference(images, warp, "constant", MEAN), expected)


def near_the_border(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Finds pixels so close to the border that rounding decides whether they lie in it: bool (N, H, W, 1)."""
    height, width = size
    row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centres = torch.stack((column, row, torch.ones_like(row)), dim=-1).double()
    x, y = (centres.flatten(0, 1) @ maps[:, :2].mT).view(-1, height, width, 2).unbind(-1)
    distances = (x, x - width, y, y - height)
    return torch.stack([distance.abs() < 2**-10 for distance in distances]).any(0)[..., None]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bilinear_is_within_a_level_of_pil(size: tuple[int, int]) -> None:
    images, maps = random_images(300, size), random_maps(300, size)
    expected = pil_transform(images, maps, Image.Resampling.BILINEAR, MEAN)
    actual = warp_reference(images, geometry.fixed_point(maps).to(torch.int32), "constant", MEAN, bilinear=True)
    difference = (actual.int() - expected.int()).abs()
    excused = near_the_border(maps, size)
    assert difference.masked_fill(excused, 0).max() <= 1
    assert excused.float().mean() < 0.01


@pytest.mark.parametrize("bilinear", [False, True], ids=["nearest", "bilinear"])
@pytest.mark.parametrize(("fill", "mode"), [("reflect", "symmetric"), ("clamp", "edge")])
@pytest.mark.parametrize("size", [(1, 1), (33, 31)], ids=str)
def test_beyond_the_border_stands_what_numpy_pads(size: tuple[int, int], fill: str, mode: str, bilinear: bool) -> None:
    margin, (height, width) = 100, size
    images = random_images(4, size)
    shift = torch.tensor([[-margin, -margin], [margin, -3], [-7, margin], [2, 41]])
    warp = geometry.fixed_point(geometry.translation(*shift.double().unbind(1))).to(torch.int32)
    actual = warp_reference(images, warp, fill, bilinear=bilinear)
    padding = [(0, 0), (margin, margin), (margin, margin), (0, 0)]
    padded = torch.from_numpy(np.pad(images.numpy(), padding, mode))
    for image, (x, y), result in zip(padded, shift.tolist(), actual, strict=True):
        assert torch.equal(result, image[margin + y :, margin + x :][:height, :width])


@pytest.mark.parametrize(
    ("size", "reach", "bilinear", "colour"),
    [
        ((1, 1), 4, True, MEAN),
        ((5, 8), 0, False, (0, 0, 0)),
        ((32, 32), 4, False, (0, 0, 0)),
        ((33, 31), 4, True, MEAN),
        ((33, 31), 60, False, MEAN),
    ],
    ids=str,
)
def test_shifts_by_whole_rows_equal_resampling(
    size: tuple[int, int], reach: int, bilinear: bool, colour: tuple[int, int, int]
) -> None:
    images = random_images(40, size)
    warp = geometry.fixed_point(shifts_and_mirrors(40, size, reach)).to(torch.int32)
    assert whole_pixels(warp, bilinear).all()
    assert torch.equal(
        warp_reference(images, warp, "constant", colour, bilinear), resample(images, warp, "constant", colour, bilinear)
    )


def test_between_pixels_no_shift_is_whole() -> None:
    half = torch.tensor([[ONE, 0, ONE, 0, ONE, ONE // 2]], dtype=torch.int32)
    assert whole_pixels(half, bilinear=False).all()
    assert not whole_pixels(half, bilinear=True).any()
