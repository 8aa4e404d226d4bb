"""The appliers against PIL and torchvision, and against each other, over the same parameters."""

import builtins
from collections.abc import Callable
from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from PIL import Image
from test_colour import WITH_PIL
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import (
    AutoAugment,
    AutoAugmentPolicy,
    RandAugment,
    TrivialAugmentWide,
    _apply_op,
)

from fastcifar.augment import BACKENDS, automatic, dali_apply
from fastcifar.augment.automatic import GEOMETRIC, Operation
from fastcifar.augment.dali_apply import COLOURS
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import POLICIES, Policy, parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Params, Slot, sample, sample_slot
from fastcifar.data.image_set import ImageSet
from fastcifar.errors import ConfigError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EXACT = [
    *POLICIES,
    "standard,autoaugment",
    "transform2_reflect,autoaugment_tv,greyscale:0.3,intensity:3,cutout:2x5",
    "standard,greyscale:0.3,intensity:2",
    "randaugment:3,14",
    "trivialaugment,coarse:3x4",
    "crop:3",
    "flip:1",
    "turns,flip",
    "rotate:30,fill:mean",
    "transform2,fill:clamp",
    "transform1,bilinear",
    "rotate:180,translate:0.5,shear:40,fill:reflect",
    "cutout:2x5",
]
"""Policies that use every part, each of which all backends carry out to the last bit."""


def image_set(count: int, size: tuple[int, int] = (32, 32)) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), ("any",), MEAN, STD)


def apply(
    backend: str, policy: Policy, dataset: ImageSet, params: Params, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    applier = resolve_name(BACKENDS[backend])(dataset, policy, Normalization(MEAN, STD), dtype, len(dataset))
    applier.submit(torch.arange(len(dataset)), params)
    images = applier.collect()
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    return images


def drawn(policy: Policy, dataset: ImageSet, epoch: int = 0) -> Params:
    return sample(policy, Key(7, epoch), torch.arange(len(dataset)), tuple(dataset.images.shape[1:3]), len(dataset))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *((text, (32, 32)) for text in EXACT),
        *(("crop:2,flip,randaugment:2,20,greyscale:0.3,cutout:1x3", size) for size in ((64, 64), (33, 17), (1, 1))),
    ],
    ids=str,
)
def test_dali_and_torch_agree_to_the_last_bit(text, size):
    dataset, policy = image_set(150, size), parse(text)
    params = drawn(policy, dataset)
    assert torch.equal(apply("dali", policy, dataset, params), apply("torch", policy, dataset, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["standard,cutout:2x6", "randaugment:1,9,greyscale:0.1"])
def test_backends_normalise_alike(text, dtype):
    """Checks for the same float32 value, rounded once; DALI's fused multiply-add may differ."""
    dataset, policy = image_set(100), parse(text)
    params = drawn(policy, dataset)
    reference = apply("torch", policy, dataset, params, dtype)
    assert torch.equal(apply("triton", policy, dataset, params, dtype), reference)
    torch.testing.assert_close(apply("dali", policy, dataset, params, dtype), reference, rtol=2e-3, atol=1e-6)


def every_draw(name: str, choice: int, size: tuple[int, int]) -> tuple[list[tuple[int, int]], Slot]:
    """Every branch of an automatic policy with the number of every value that its choice can take, and their slot."""
    table = getattr(automatic, name)(size)
    options = [branch[choice] for branch in table.branches]
    draws = [(branch, place) for branch, option in enumerate(options) for place in range(len(option.values))]
    draws = [(branch, place) for branch, place in draws if options[branch].probability]
    words = torch.zeros(len(draws), 4, dtype=torch.int64)
    for row, (branch, place) in enumerate(draws):
        words[row, 1] = -(-(place << 32) // len(options[branch].values))
    return draws, sample_slot(table, torch.tensor(draws)[:, 0], choice, words, size)


def assert_images(backend: str, name: str, slot: Slot, size: tuple[int, int], expected: Callable) -> None:
    """Every third image lies within a narrow range, where contrast is stretched, and every tenth has one colour."""
    images = image_set(len(slot.operation), size).images.clone()
    images[::3] = images[::3] // 5 + 90
    images[::10] = images[::10, :1, :1]
    dataset = replace(image_set(len(images), size), images=images)
    got = apply(backend, parse(name), dataset, Params(slots=(slot,))).permute(0, 2, 3, 1)
    for row, (image, augmented) in enumerate(zip(images, got, strict=True)):
        picture = expected(Image.fromarray(image.numpy()), row, Operation(int(slot.operation[row])))
        assert np.array_equal(augmented, picture), (row, slot.operation[row], slot.value[row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "theirs", "choice"),
    [
        ("autoaugment_tv", AutoAugment(AutoAugmentPolicy.CIFAR10), 0),
        ("autoaugment_tv", AutoAugment(AutoAugmentPolicy.CIFAR10), 1),
        ("randaugment", RandAugment(magnitude=9), 0),
        ("trivialaugment", TrivialAugmentWide(), 0),
    ],
    ids=["autoaugment first", "autoaugment second", "randaugment", "trivialaugment"],
)
def test_every_operation_in_every_bin_is_torchvisions(backend, name, theirs, choice):
    """We choose the operation, the bin and the sign; torchvision computes the magnitude and the image."""
    size = (24, 32)
    draws, slot = every_draw(name, choice, size)
    bins = {"autoaugment_tv": (10, size), "randaugment": (31, size), "trivialaugment": (31,)}[name]
    space = {"Identity": (torch.tensor(0.0), False), **theirs._augmentation_space(*bins)}

    def expected(picture: Image.Image, row: int, operation: Operation) -> Image.Image:
        branch, place = draws[row]
        called = "".join(part.capitalize() for part in operation.name.split("_"))
        magnitudes, signed = space[called]
        if name == "autoaugment_tv":
            policy, _, level = theirs.policies[branch][choice]
            assert called == policy
        else:
            level = 9 if name == "randaugment" else place // 2 if signed else place
        magnitude = float(magnitudes[level].item()) if magnitudes.ndim else 0.0
        magnitude = -magnitude if signed and place % 2 else magnitude
        return _apply_op(picture, called, magnitude, InterpolationMode.NEAREST, fill=[0, 0, 0])

    assert_images(backend, name, slot, size, expected)


GREY = (128, 128, 128)


def by_the_authors(picture: Image.Image, operation: Operation, level: int, sign: int) -> Image.Image:
    """An operation at a level of 10, as the authors of AutoAugment compute it, over a grey border."""

    def affine(*six: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, six, fillcolor=GREY)

    moved = {
        Operation.SHEAR_X: lambda: affine(1, sign * level * 0.3 / 10, 0, 0, 1, 0),
        Operation.SHEAR_Y: lambda: affine(1, 0, 0, sign * level * 0.3 / 10, 1, 0),
        Operation.TRANSLATE_X: lambda: affine(1, 0, -sign * int(level * 10 / 10), 0, 1, 0),
        Operation.TRANSLATE_Y: lambda: affine(1, 0, 0, 0, 1, -sign * int(level * 10 / 10)),
        Operation.ROTATE: lambda: picture.rotate(sign * int(level * 30 / 10), fillcolor=GREY),
    }
    if operation in moved:
        return moved[operation]()
    values = {Operation.SOLARIZE: 256 - int(level * 256 / 10), Operation.POSTERIZE: 4 - int(level * 4 / 10)}
    return WITH_PIL[operation](picture, values.get(operation, level * 1.8 / 10 + 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", [0, 1])
def test_every_choice_of_the_papers_policy_is_the_authors(backend, choice):
    draws, slot = every_draw("autoaugment", choice, (32, 32))

    def expected(picture: Image.Image, row: int, operation: Operation) -> Image.Image:
        branch, place = draws[row]
        _, _, level = automatic.CIFAR10_SUB_POLICIES[branch][choice]
        return by_the_authors(picture, operation, level, -1 if place else 1)

    assert_images(backend, "autoaugment", slot, (32, 32), expected)


def test_equalize_is_all_that_dali_leaves_to_torch():
    assert set(Operation) - GEOMETRIC - COLOURS.keys() == {Operation.IDENTITY, Operation.EQUALIZE}


def test_erased_squares_take_the_mean_or_black():
    dataset = image_set(50)
    for text, colour in (("cutout:1x8", (125, 123, 114)), ("coarse:2x6", (0, 0, 0))):
        policy = parse(text)
        params = drawn(policy, dataset)
        got = apply("torch", policy, dataset, params).permute(0, 2, 3, 1)
        expected = dataset.images.clone()
        for image, boxes in zip(expected, params.boxes.tolist(), strict=True):
            for top, left, bottom, right in boxes:
                image[top:bottom, left:right] = torch.tensor(colour, dtype=torch.uint8)
        assert torch.equal(got, expected)


def test_chunks_do_not_overwrite_each_other():
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    dataset, policy = image_set(64), parse("standard")
    applier = resolve_name(BACKENDS["dali"])(dataset, policy, Normalization(MEAN, STD), torch.uint8, 64)
    params = [drawn(policy, dataset, epoch) for epoch in range(3)]
    outputs = []
    for each in params:
        applier.submit(torch.arange(64), each)
        outputs.append(applier.collect())
    for each, output in zip(params, outputs, strict=True):
        assert torch.equal(output, apply("torch", policy, dataset, each))


def test_whether_dali_works_is_told_by_trying(monkeypatch):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    assert dali_apply.why_unusable(torch.device("cpu")) is None

    def refuse(self, tensors):
        raise RuntimeError("CUDA driver version is insufficient\nlong trace")

    monkeypatch.setattr(dali_apply.Graph, "start", refuse)
    assert dali_apply.why_unusable(torch.device("cpu")) == "CUDA driver version is insufficient"


def test_absent_dali_is_one_sentence(monkeypatch):
    genuine = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("nvidia.dali"):
            raise ImportError("not here")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"install nvidia-dali-cuda130 or choose --loader torch\.$"):
        resolve_name(BACKENDS["dali"])(image_set(2), Policy(), Normalization(MEAN, STD), torch.uint8, 8)


def test_intensities_are_multiples_of_the_principal_components_by_numpy():
    """Krizhevsky et al. 2012: [p1, p2, p3] [a1 l1, a2 l2, a3 l3] is added, which does not depend on the sign of a p."""
    dataset, policy = image_set(200, (9, 7)), parse("intensity:0.5")
    dataset.images[..., 1] = dataset.images[..., 0] // 2  # so that the axes differ
    params = drawn(policy, dataset)
    assert params.intensity.std() == pytest.approx(0.5, rel=0.1)
    pixels = dataset.images.view(-1, 3).numpy() / 255
    values, vectors = np.linalg.eigh(np.cov(pixels, rowvar=False, bias=True))
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    shift = np.rint(255 * vectors @ (params.intensity.numpy() * values).T).T
    expected = np.clip(dataset.images.numpy() + shift[:, None, None], 0, 255)
    assert np.array_equal(apply("torch", policy, dataset, params).permute(0, 2, 3, 1), expected)
