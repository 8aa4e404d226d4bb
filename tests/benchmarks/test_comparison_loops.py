"""The loops that fastcifar is compared with do what torchvision and fastcifar do, and their figures are right."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from fastcifar.config import AverageConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.setup import resolve

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import comparison


def image_set(count: int, size: int = 32) -> ImageSet:
    draw = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.arange(count) % 10, tuple("abcdefghij"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def task() -> comparison.Task:
    config = RunConfig(
        ModelConfig("resnet", blocks=(1,), channels=(4,)),
        optim=OptimConfig(scale_lr="linear"),
        average=AverageConfig(ema_decay=(0.0,)),
        engine=EngineConfig("cpu", "fp32", compile="off"),
        epochs=2,
        batch_size=8,
    )
    return comparison.Task(resolve(config)[0], image_set(20), image_set(13))


def test_images_are_normalised_as_torchvision_does():
    images = image_set(3)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(images.mean, images.std)])
    expected = torch.stack([transform(image.numpy()) for image in images.images])
    levels = [255 * torch.tensor(values) for values in (images.mean, images.std)]
    torch.testing.assert_close(comparison.normalized(images.images, *levels), expected)


def test_plain_loops_call_none_of_our_operators(gpu, task):
    """On a GPU, where our networks' layers would be kernels, the loops do not wait either."""

    class Ours(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            assert function.namespace != "fastcifar", function
            return function(*arguments, **(options or {}))

    config = replace(task.config, engine=EngineConfig("cuda:0", "bf16", compile="off"))
    loop = comparison.EagerAmp(replace(task, config=config))
    with Ours(), gpu.steady():
        loop.network.train()
        images, labels = next(loop.batches())
        loop.loss(images, labels).backward()
        loop.optimizer.step()


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror_image():
    torch.manual_seed(0)
    images, reach = image_set(5, size=6).images, range(2 * comparison.PADDING + 1)
    padded = F.pad(images, (0, 0, *[comparison.PADDING] * 4))
    index = torch.arange(200) % 5
    seen = set()
    for number, crop in zip(index.tolist(), comparison.cropped_and_flipped(padded, index), strict=True):
        windows = {(top, left): padded[number, top : top + 6, left : left + 6] for top in reach for left in reach}
        found = [
            (*place, flipped)
            for place, w in windows.items()
            for flipped in (False, True)
            if torch.equal(crop, w.flip(1) if flipped else w)
        ]
        assert found
        seen.update(found if len(found) == 1 else ())
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(reach)
    assert {flipped for *_, flipped in seen} == {False, True}


def test_the_plain_loops_learn_what_fastcifar_learns(task, monkeypatch):
    """Starts from the same weights, on the same batches, in float32."""
    ours = comparison.Fastcifar(task)
    batches = [list(ours.trainer.loader.batches(epoch)) for epoch in range(2)]
    for name in ("reports", "eager_amp"):
        loop = comparison.LOOPS[name](task)
        normalized = partial(comparison.normalized, mean=loop.mean, std=loop.std)
        prepared = iter([[(normalized(x.permute(0, 2, 3, 1)), y) for x, y in epoch] for epoch in batches])
        monkeypatch.setattr(loop, "batches", lambda prepared=prepared: next(prepared))
        loop.epoch()
        loop.epoch()
        if name == "reports":
            ours.epoch()
            ours.epoch()
        for (key, expected), got in zip(
            ours.trainer.model.state_dict().items(), loop.model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert loop.accuracy() == pytest.approx(ours.accuracy(), abs=1.5 / 13)


@pytest.mark.parametrize("name", ["eager_amp", "reports"])
def test_an_epoch_has_full_batches_of_different_images(task, name):
    loop = comparison.LOOPS[name](task)
    batches = list(loop.batches())
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 32, 32)] * 2
    assert all(images.dtype == torch.float32 and images.is_contiguous() for images, _ in batches)
    assert torch.cat([labels for _, labels in batches]).bincount(minlength=10).max() <= 2


def test_preparing_leaves_the_weights_as_they_are(task, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    loop = comparison.Compiled(task)
    kept = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    loop.prepare()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loop.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert loop.optimizer.defaults["fused"]


def test_what_the_times_of_a_loop_come_to(task, monkeypatch):
    import test_comparison

    monkeypatch.setattr(test_comparison, "matmul_flops_per_second", lambda device, dtype: 1e12)
    monkeypatch.setitem(test_comparison.rates, "reports", 4.0)
    found = test_comparison.figures(task, "eager_amp", [4.0, 1.0, 2.0], [0.3, 0.95, 0.4])
    assert (found["images_per_second"], found["times_reports"], found["seconds_to_target"]) == (8.0, 2.0, 5.0)
    assert test_comparison.figures(task, "eager_amp", [4.0, 1.0, 2.0], [0.3, 0.4, 0.4])["seconds_to_target"] is None
