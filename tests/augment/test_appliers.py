"""Both appliers against PIL and against each other, over the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastcifar.augment import BACKENDS, build_policy
from fastcifar.augment.normalize import Normalization
from fastcifar.augment.policy import Params, Policy
from fastcifar.augment.random import Key
from fastcifar.errors import ConfigError
from fastcifar.registry import load

NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CPU = torch.device("cpu")


def applier(backend: str, shape: tuple[int, int], dtype: torch.dtype = torch.uint8, chunk_size: int = 256):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return load(BACKENDS[backend])(shape, chunk_size, dtype, NORMALIZATION, CPU)


def apply(backend: str, images: torch.Tensor, params: Params, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    chosen = applier(backend, tuple(images.shape[1:3]), dtype)
    chosen.submit(images, params)
    return chosen.collect()


def with_pil(image: torch.Tensor, shift: torch.Tensor, flip: bool, padding: int) -> np.ndarray:
    """Pad, crop, mirror, as torchvision does it with PIL."""
    height, width = image.shape[:2]
    padded = ImageOps.expand(Image.fromarray(image.numpy()), padding, fill=0)
    y, x = (shift + padding).tolist()
    cropped = padded.crop((x, y, x + width, y + height))
    return np.asarray(ImageOps.mirror(cropped) if flip else cropped)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(32, 32), (17, 23), (5, 8)], ids=str)
@pytest.mark.parametrize("chosen", [Policy(4, 0.5), Policy(2, 0.0), Policy(0, 1.0), Policy()], ids=["standard", "crop", "flip", "none"])
def test_equals_pil_to_the_last_bit(backend, shape, chosen):
    images = torch.randint(0, 256, (67, *shape, 3), dtype=torch.uint8)
    params = chosen.sample(Key(0, 0), torch.arange(67))
    augmented = apply(backend, images, params)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    for i in range(67):
        expected = with_pil(images[i], params.shift[i], bool(params.flip[i]), 4)
        assert np.array_equal(augmented[i].permute(1, 2, 0), expected), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_backends_agree_in_every_dtype(dtype):
    images = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8)
    params = build_policy("standard").sample(Key(1, 2), torch.arange(200))
    reference, device_pipeline = (apply(backend, images, params, dtype) for backend in ("torch", "dali"))
    assert reference.dtype == device_pipeline.dtype == dtype
    # Both round the same float32 value once, but for DALI's fused multiply-add.
    torch.testing.assert_close(reference, device_pipeline, rtol=2e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normalisation_against_float64(dtype):
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (NORMALIZATION.mean, NORMALIZATION.std))
    expected = (images.double() / 255 - mean) / std
    got = NORMALIZATION(images, dtype).permute(0, 2, 3, 1).double()
    # Scale, product, offset and sum are rounded to float32, half an eps each; then the result to its dtype.
    terms = images.double() / 255 / std + mean / std
    bound = 1.5 * torch.finfo(torch.float32).eps * terms + 0.5 * torch.finfo(dtype).eps * expected.abs()
    assert bool(((got - expected).abs() <= bound).all())


def test_dali_chunks_do_not_overwrite_each_other():
    chosen = applier("dali", (32, 32), chunk_size=64)
    images = torch.randint(0, 256, (3, 64, 32, 32, 3), dtype=torch.uint8)
    params = [build_policy("standard").sample(Key(0, epoch), torch.arange(64)) for epoch in range(3)]
    outputs = []
    for chunk, drawn in zip(images, params, strict=True):
        chosen.submit(chunk, drawn)
        outputs.append(chosen.collect())
    for chunk, drawn, output in zip(images, params, outputs, strict=True):
        assert torch.equal(output, apply("torch", chunk, drawn))


def test_absent_dali_is_one_sentence(monkeypatch):
    import builtins

    genuine = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("nvidia.dali"):
            raise ImportError("not here")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"install nvidia-dali-cuda130 or choose --loader torch\.$"):
        load(BACKENDS["dali"])((32, 32), 8, torch.uint8, NORMALIZATION, CPU)


def test_unknown_policy_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean standard"):
        build_policy("standart")
