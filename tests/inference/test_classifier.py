"""Views of test-time augmentation, against airbench's own code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.inference.classifier import logits_of_views


def airbench(model: nn.Module, inputs: Tensor, level: int) -> Tensor:
    """Computes airbench94's `infer` for images of any size."""

    def infer_mirror(inputs: Tensor) -> Tensor:
        return 0.5 * model(inputs) + 0.5 * model(inputs.flip(-1))

    if level < 2:
        return infer_mirror(inputs) if level else model(inputs)
    height, width = inputs.shape[2:]
    padded = F.pad(inputs, (1,) * 4, "reflect")
    views = [padded[:, :, 0:height, 0:width], padded[:, :, 2 : height + 2, 2 : width + 2]]
    return 0.5 * infer_mirror(inputs) + 0.5 * torch.stack([infer_mirror(view) for view in views]).mean(0)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize(("level", "name", "passes"), [(0, "none", 1), (1, "mirror", 2), (2, "mirror-shift", 6)])
def test_views_are_those_of_airbench(size: tuple[int, int], level: int, name: str, passes: int) -> None:
    """The network depends on every pixel; as many passes are run as each level costs."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (size[0] - 2) * (size[1] - 2), 5)
    model, images, calls = nn.Sequential(*layers).double(), torch.randn(3, 3, *size, dtype=torch.float64), []
    expected = airbench(model, images, level).float()
    model.register_forward_hook(lambda *_: calls.append(1))
    found = logits_of_views(model, images, name)
    assert len(calls) == passes
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
