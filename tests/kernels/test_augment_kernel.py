"""The augmentation op against PIL and numpy, to the last bit, and its launch and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from harness import needs_kernels
from PIL import Image
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

from fastcifar.augment import geometry
from fastcifar.kernels.augment import augment, erase_reference, greyscale_reference, normalize_reference
from fastcifar.kernels.checks import FLOATS
from fastcifar.kernels.warp import CPU_CHUNK, FILLS, ONE, resample, warp_reference, whole_pixels

SIZES = ((1, 1), (5, 8), (32, 32), (33, 31))
MEAN = (125, 123, 114)
NOTHING = dict.fromkeys(("index", "warp", "grey", "boxes"))


def random_images(count: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def shifts_and_mirrors(count: int, size: tuple[int, int], reach: int = 4, seed: int = 0) -> Tensor:
    """float64 (N, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(-reach, reach + 1, (2, count), generator=generator).double()
    return geometry.translation(x, y) @ geometry.mirror(torch.rand(count, generator=generator) < 0.5, size[1])


def random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Crops, mirrors, rotations and shears: float64 (N, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    angle, slant, tilt = torch.rand(3, count, dtype=torch.float64, generator=generator) * 2 - 1
    centre = (size[1] / 2, size[0] / 2)
    maps = [
        shifts_and_mirrors(count, size, seed=seed),
        geometry.shear(slant, tilt, centre),
        geometry.rotation(angle * 180, centre),
    ]
    return reduce(torch.matmul, maps)


def arguments(size: tuple[int, int], count: int = 5, boxes: int = 2, **options: Any) -> dict[str, Any]:
    """All arguments of the op; `options` replaces some."""
    generator = torch.Generator().manual_seed(size[0])
    corners = torch.randint(-2, max(size) + 2, (count, boxes, 4), dtype=torch.int32, generator=generator)
    maps = torch.where(
        torch.arange(count)[:, None, None] % 2 == 0, random_maps(count, size), shifts_and_mirrors(count, size)
    )
    normalized = options.get("out_dtype") != torch.uint8
    return {
        "images": random_images(7, size),
        "index": torch.randint(0, 7, (count,), generator=generator),
        "warp": geometry.fixed_point(maps).to(torch.int32),
        "grey": torch.arange(count) % 3 == 0,
        "boxes": corners,
        "scale": torch.tensor([0.0171, 0.0175, 0.0174]) if normalized else None,
        "offset": torch.tensor([-2.118, -2.036, -1.804]) if normalized else None,
        "out_dtype": torch.bfloat16,
        "fill": "constant",
        "colour": MEAN,
        "bilinear": False,
        "erase_colour": (1, 2, 255),
        **options,
    }


def pil_transform(images: Tensor, maps: Tensor, resampling: Image.Resampling, colour: tuple[int, int, int]) -> Tensor:
    """PIL's own resampling, an image at a time."""
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
    """Pixels that read so close to the border that rounding decides whether they find the image: bool (N, H, W, 1)."""
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


@pytest.mark.parametrize("fill", ["reflect", "clamp"])
def test_bilinear_reads_the_padded_image(fill: str) -> None:
    """Within a margin wide enough, a fill is the same as padding first and resampling in the middle then."""
    margin, size = 40, (17, 23)
    images, maps = random_images(50, size), random_maps(50, size)
    padding = [(0, 0), (margin, margin), (margin, margin), (0, 0)]
    padded = torch.from_numpy(np.pad(images.numpy(), padding, {"reflect": "symmetric", "clamp": "edge"}[fill]))
    shift = torch.full((50,), float(margin), dtype=torch.float64)
    wide_maps = geometry.translation(shift, shift) @ maps @ geometry.translation(-shift, -shift)
    expected = warp_reference(padded, geometry.fixed_point(wide_maps).to(torch.int32), bilinear=True)
    actual = warp_reference(images, geometry.fixed_point(maps).to(torch.int32), fill, bilinear=True)
    middle = expected[:, margin:-margin, margin:-margin]
    # The shifts there and back are rounded to fixed point again.
    assert (actual.int() - middle.int()).abs().max() <= 2


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


@pytest.mark.parametrize("bilinear", [False, True], ids=["nearest", "bilinear"])
def test_shifts_among_other_maps_equal_resampling(bilinear: bool) -> None:
    count = 2 * CPU_CHUNK + 3
    images = random_images(count, (17, 23))
    warp = arguments((17, 23), count)["warp"]
    assert 0 < whole_pixels(warp, bilinear).sum() < count
    assert torch.equal(
        warp_reference(images, warp, bilinear=bilinear), resample(images, warp, "constant", (0, 0, 0), bilinear)
    )


def test_between_pixels_no_shift_is_whole() -> None:
    half = torch.tensor([[ONE, 0, ONE, 0, ONE, ONE // 2]], dtype=torch.int32)
    assert whole_pixels(half, bilinear=False).all()
    assert not whole_pixels(half, bilinear=True).any()


def test_the_images_are_left_alone() -> None:
    given = arguments((5, 8), index=None, count=7)
    before = given["images"].clone()
    augment(**given)
    assert torch.equal(given["images"], before)


def test_what_is_none_is_left_out() -> None:
    untouched = augment(**{**arguments((5, 8), count=7, out_dtype=torch.uint8), **NOTHING})
    assert torch.equal(untouched, random_images(7, (5, 8)))


def test_grey_is_that_of_pil() -> None:
    images = random_images(50, (17, 23))
    grey = torch.arange(50) % 3 == 0
    modes = ["L" if chosen else "RGB" for chosen in grey]
    expected = [
        np.array(Image.fromarray(image.numpy()).convert(mode).convert("RGB"))
        for image, mode in zip(images, modes, strict=True)
    ]
    assert torch.equal(greyscale_reference(images, grey), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize(("size", "squares"), [((1, 1), 3), ((32, 32), 1), ((33, 31), 64)], ids=str)
def test_boxes_are_painted_over(size: tuple[int, int], squares: int) -> None:
    images = random_images(20, size)
    boxes = torch.randint(
        -3, max(size) + 3, (20, squares, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    expected = images.numpy().copy()
    for image, corners in zip(expected, boxes.tolist(), strict=True):
        for corner in corners:
            top, left, bottom, right = (max(0, place) for place in corner)
            image[top:bottom, left:right] = MEAN
    assert torch.equal(erase_reference(images, boxes, MEAN), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_normalization_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    images = random_images(20, (5, 8))
    scale, offset = arguments((5, 8))["scale"], arguments((5, 8))["offset"]
    exact = images.double() * scale.double() + offset.double()
    assert_as_accurate_as_torch(
        normalize_reference(images, scale, offset, dtype), (images.float() * scale + offset).to(dtype), exact
    )


def test_the_order_is_gather_warp_grey_erase_normalize() -> None:
    given = arguments((17, 23))
    images = warp_reference(given["images"][given["index"]], given["warp"], "constant", MEAN)
    images = erase_reference(greyscale_reference(images, given["grey"]), given["boxes"], given["erase_colour"])
    assert torch.equal(augment(**given), normalize_reference(images, given["scale"], given["offset"], torch.bfloat16))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("bilinear", [False, True], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("fill", FILLS)
def test_few_images(count: int, bilinear: bool, fill: str) -> None:
    result = augment(**arguments((5, 8), count=count, bilinear=bilinear, fill=fill))
    assert result.shape == (count, 5, 8, 3)
    assert result.is_contiguous()


@needs_kernels
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("absent", [{}, NOTHING], ids=["everything", "images-alone"])
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_writes_the_output_alone(
    absent: dict[str, None], kernel_writes: Callable[..., list[list[str]]]
) -> None:
    given = {**arguments((17, 23), count=7), **absent}
    names = [name for name, value in given.items() if isinstance(value, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        return augment(**{**given, **dict(zip(names, tensors, strict=True))})

    assert kernel_writes(call, *(given[name] for name in names)) == [["output_ptr"]]


GOOD = arguments((5, 8))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("images", GOOD["images"].int(), TypeError),
        ("images", GOOD["images"][0], ValueError),
        ("images", torch.zeros(7, 5, 8, 4, dtype=torch.uint8), ValueError),
        ("images", torch.zeros(7, 0, 8, 3, dtype=torch.uint8), ValueError),
        ("images", torch.zeros(7, 1, 32768, 3, dtype=torch.uint8), ValueError),
        ("index", GOOD["index"].int(), TypeError),
        ("index", GOOD["index"][0], ValueError),
        ("warp", GOOD["warp"].long(), TypeError),
        ("warp", GOOD["warp"][1:], ValueError),
        ("warp", GOOD["warp"].to("meta"), ValueError),
        ("grey", GOOD["grey"].byte(), TypeError),
        ("boxes", GOOD["boxes"][:, 0], ValueError),
        ("boxes", GOOD["boxes"][:, :1], ValueError),
        ("scale", GOOD["scale"].double(), TypeError),
        ("scale", None, ValueError),
        ("offset", GOOD["offset"].half(), TypeError),
        ("offset", None, ValueError),
        ("out_dtype", torch.float64, TypeError),
        ("fill", "mirror", ValueError),
        ("colour", (0, 0), ValueError),
        ("colour", (0, 0, 256), ValueError),
        ("erase_colour", (0, -1, 0), ValueError),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        augment(**{**GOOD, name: value})


def test_bytes_are_not_normalized() -> None:
    with pytest.raises(ValueError, match=r"^scale must .*\.$"):
        augment(**{**GOOD, "out_dtype": torch.uint8})


@pytest.mark.gpu
@needs_kernels
def test_tensors_on_the_cpu_follow_the_images() -> None:
    given = arguments((33, 31), count=300)
    assert torch.equal(augment(**{**given, "images": given["images"].cuda()}).cpu(), augment(**given))
