"""The appliers against PIL and torchvision, and against each other, over the same parameters."""

import builtins
from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from fastcifar.augment import BACKENDS, dali_apply
from fastcifar.augment.automatic import ENHANCING, GEOMETRIC, Operation
from fastcifar.augment.dali_apply import COLOURS
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import POLICIES, Policy, parse
from fastcifar.augment.random import Key
from fastcifar.augment.sampling import Params, Slot, sample, slot_warp
from fastcifar.data.image_set import ImageSet
from fastcifar.errors import ConfigError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EXACT = [
    *POLICIES,
    "standard,autoaugment",
    "transform2_reflect,autoaugment_tv,greyscale:0.3,cutout:2x5",
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


VALUES = {
    **{operation: (-0.3, 0.99) for operation in (Operation.SHEAR_X, Operation.SHEAR_Y)},
    **{operation: (-14.0, 9.0) for operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y)},
    Operation.ROTATE: (-135.0, 30.0),
    Operation.SOLARIZE: (0.0, 256.0),
    Operation.POSTERIZE: (1.0, 8.0),
}
WHOLE = (Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.POSTERIZE)


def with_torchvision(picture: Image.Image, operation: Operation, value: float) -> Image.Image:
    """Runs torchvision's own step of its automatic policies; its enhancement factors are relative to 1."""
    name = "".join(part.capitalize() for part in operation.name.split("_"))
    magnitude = value - 1 if operation in ENHANCING else value
    return _apply_op(picture, name, magnitude, InterpolationMode.NEAREST, fill=[0, 0, 0])


@pytest.mark.parametrize("operation", sorted(GEOMETRIC | COLOURS.keys()), ids=lambda operation: operation.name.lower())
def test_dalis_own_operations_equal_torchvision_on_pil_images(operation):
    """Every third image lies within a narrow range, where contrast is stretched, and every tenth has one colour."""
    images = image_set(80).images.clone()
    images[::3] = images[::3] // 5 + 90
    images[::10] = images[::10, :1, :1]
    values = torch.linspace(*VALUES.get(operation, (0.05, 1.95)), 80, dtype=torch.float64)
    values = values.round() if operation in WHOLE else values
    operations = torch.full((80,), int(operation))
    slot = Slot(operations, values, slot_warp(operations, values, (32, 32)), 0)
    dataset = replace(image_set(80), images=images)
    got = apply("dali", parse("trivialaugment"), dataset, Params(None, (slot,), None, None, None))
    for image, value, augmented in zip(images, values.tolist(), got, strict=True):
        expected = np.asarray(with_torchvision(Image.fromarray(image.numpy()), operation, value))
        assert np.array_equal(augmented.permute(1, 2, 0), expected), value


def test_equalize_is_all_that_dali_leaves_to_torch():
    assert set(Operation) - GEOMETRIC - COLOURS.keys() == {Operation.IDENTITY, Operation.EQUALIZE}


@pytest.mark.parametrize("name", ["autoaugment_tv", "randaugment:2,9", "trivialaugment"])
def test_whole_policies_against_torchvision_on_pil_images(name):
    dataset, policy = image_set(200), parse(name)
    params = drawn(policy, dataset)
    got = apply("torch", policy, dataset, params)
    for i in range(200):
        picture = Image.fromarray(dataset.images[i].numpy())
        for slot in params.slots:
            picture = with_torchvision(picture, Operation(int(slot.operation[i])), float(slot.value[i]))
        assert np.array_equal(got[i].permute(1, 2, 0), np.asarray(picture)), i


def test_fill_of_the_papers_policy_is_grey():
    dataset = image_set(4)
    params = drawn(parse("autoaugment"), dataset)
    slot = params.slots[0]
    values = torch.full((4,), 9.0, dtype=torch.float64)
    operations = torch.full((4,), int(Operation.TRANSLATE_Y))
    moved = replace(slot, operation=operations, value=values, warp=slot_warp(operations, values, (32, 32)))
    got = apply("torch", parse("autoaugment"), dataset, replace(params, slots=(moved,)))
    assert torch.equal(got[:, :, :9], torch.full((4, 3, 9, 32), 128, dtype=torch.uint8))
    assert torch.equal(got[:, :, 9:].permute(0, 2, 3, 1), dataset.images[:, :-9])


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
