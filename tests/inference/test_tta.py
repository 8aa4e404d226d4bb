"""Test-time augmentation against airbench's own way of writing it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.inference.tta import PASSES, logits_of_views


class Counted(nn.Module):
    """A network whose every pixel matters, and which counts its passes."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (height - 2) * (width - 2), 5)
        ).double()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layers(x)


def airbench(model: nn.Module, inputs: Tensor, size: tuple[int, int], level: int) -> Tensor:
    """`infer` of airbench94, for images of any size."""

    def infer_mirror(inputs: Tensor) -> Tensor:
        return 0.5 * model(inputs) + 0.5 * model(inputs.flip(-1))

    if level < 2:
        return infer_mirror(inputs) if level else model(inputs)
    height, width = size
    padded = F.pad(inputs, (1,) * 4, "reflect")
    views = [padded[:, :, 0:height, 0:width], padded[:, :, 2 : height + 2, 2 : width + 2]]
    return 0.5 * infer_mirror(inputs) + 0.5 * torch.stack([infer_mirror(view) for view in views]).mean(0)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize(("level", "name"), list(enumerate(PASSES)))
def test_views_are_those_of_airbench(size: tuple[int, int], level: int, name: str) -> None:
    torch.manual_seed(1)
    model, images = Counted(*size), torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = logits_of_views(model, images, name)
        assert model.passes == PASSES[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, airbench(model, images, size, level).float())


@pytest.mark.parametrize("name", ["mirror", "mirror-shift"])
def test_a_mirrored_image_has_the_same_logits(name: str) -> None:
    torch.manual_seed(2)
    model, images = Counted(8, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        plain, mirrored = (logits_of_views(model, view, "mirror") for view in (images, images.flip(3)))
        assert not torch.allclose(model(images), model(images.flip(3)))
    torch.testing.assert_close(plain, mirrored)
