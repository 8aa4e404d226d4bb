"""A batch in several passes has the gradient, the loss and the right answers of the whole batch, and waits for
nothing.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.engine.objective import Outcome
from fastcifar.engine.shadow import Shadow
from fastcifar.engine.step import Backward, Forward, SlicedPass, Step, Workspace

NO_SHADOW = Shadow(nn.Module(), torch.empty(0), torch.float32)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the value of a tensor."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*arguments, **(options or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    ).double()


def objective_of(model: nn.Module):
    def objective(images, labels):
        logits = model(images.double() / 255)
        hard = labels if labels.dim() == 1 else labels.argmax(1)
        return Outcome(F.cross_entropy(logits, labels, label_smoothing=0.1), (logits.detach().argmax(1) == hard).sum())

    return objective


def batch(mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (21, 9, 9, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.arange(21) % 5
    return images, (F.one_hot(labels, 5) * 0.7 + 0.06).double() if mixed else labels


@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "mixed"])
@pytest.mark.parametrize("micro_batch", [1, 7, 8, 20, 21, 64])
def test_passes_add_up_to_the_batch(micro_batch, mixed):
    scaler, whole, sliced = torch.amp.GradScaler("cpu", enabled=False), network(), network()
    expected, work = Workspace(0, *batch(mixed)), Workspace(0, *batch(mixed))
    Step((Forward(objective_of(whole), NO_SHADOW), Backward(scaler, NO_SHADOW)))(expected)
    with NoWaiting():
        SlicedPass(objective_of(sliced), scaler, NO_SHADOW, micro_batch)(work)
    assert work.outcome.loss.item() == pytest.approx(expected.outcome.loss.item(), rel=1e-14)
    assert work.outcome.correct.item() == expected.outcome.correct.item()
    assert not work.loss.requires_grad
    for ours, theirs in zip(sliced.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_the_first_of_two_passes_is_recorded():
    """As SAM has it, whose second gradient belongs to other weights."""
    model = network()
    part, work = (
        SlicedPass(objective_of(model), torch.amp.GradScaler("cpu", enabled=False), NO_SHADOW, 8),
        Workspace(0, *batch(False)),
    )
    part(work)
    first = work.outcome
    with torch.no_grad():
        model[0].weight.mul_(3)
    part(work)
    assert work.outcome is first
    assert work.loss != first.loss


def test_a_scaled_loss_scales_every_pass():
    plain, scaled = network(), network()
    for model, scaler in (
        (plain, torch.amp.GradScaler("cpu", enabled=False)),
        (scaled, torch.amp.GradScaler("cpu", init_scale=1024.0)),
    ):
        SlicedPass(objective_of(model), scaler, NO_SHADOW, 8)(Workspace(0, *batch(False)))
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 1024 * theirs.grad, rtol=1e-12, atol=1e-15)
