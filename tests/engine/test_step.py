"""The parts of a step: slices give a batch's gradient and metrics; a meter is read without waiting."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.engine.objective import BatchMetrics
from fastcifar.engine.shadow import Shadow
from fastcifar.engine.step import Backward, Forward, LiveMeter, Meter, SlicedPass, Step, Totals, Workspace
from fastcifar.kernels.bookkeeping import NEVER

NO_SHADOW = Shadow(nn.Module(), torch.empty(0), torch.float32)
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


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
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return BatchMetrics(loss, (logits.detach().argmax(1) == hard).sum())

    return objective


def batch(mixed: bool = False) -> Workspace:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (21, 9, 9, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.arange(21) % 5
    return Workspace(0, images, (F.one_hot(labels, 5) * 0.7 + 0.06).double() if mixed else labels)


@pytest.mark.parametrize(("micro_batch", "mixed"), [(1, False), (7, False), (8, True), (21, False), (64, True)])
def test_slices_add_up_to_the_batch(micro_batch, mixed):
    whole, sliced, expected, work = network(), network(), batch(mixed), batch(mixed)
    Step((Forward(objective_of(whole), NO_SHADOW), Backward(UNSCALED, NO_SHADOW)))(expected)
    with NoWaiting():
        SlicedPass(objective_of(sliced), UNSCALED, NO_SHADOW, micro_batch)(work)
    assert work.metrics.loss.item() == pytest.approx(expected.metrics.loss.item(), rel=1e-14)
    assert work.metrics.correct.item() == expected.metrics.correct.item()
    assert not work.loss.requires_grad
    for ours, theirs in zip(sliced.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_the_first_of_two_passes_is_recorded():
    """SAM has two passes, the second of which has a gradient of other weights."""
    model, work = network(), batch()
    part = SlicedPass(objective_of(model), UNSCALED, NO_SHADOW, 8)
    part(work)
    first = work.metrics
    with torch.no_grad():
        model[0].weight.mul_(3)
    part(work)
    assert work.metrics is first
    assert work.loss != first.loss


def test_a_scaled_loss_scales_every_slice():
    plain, scaled = network(), network()
    SlicedPass(objective_of(plain), UNSCALED, NO_SHADOW, 8)(batch())
    SlicedPass(objective_of(scaled), torch.amp.GradScaler("cpu", init_scale=1024.0), NO_SHADOW, 8)(batch())
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 1024 * theirs.grad, rtol=1e-12, atol=1e-15)


class PretendedDevice:
    """Does what a GPU does with a queued copy, which arrives when the device comes to it."""

    def __init__(self, live: LiveMeter) -> None:
        live.host, live.arrival = torch.full((3,), -1.0, dtype=torch.float64), self
        self.live, self.arrived = live, False

    def record(self) -> None:
        self.queued, self.arrived = self.live.sums.clone(), False
        self.live.host.fill_(-1.0)

    def query(self) -> bool:
        return self.arrived

    def come_to_it(self) -> None:
        self.live.host.copy_(self.queued)
        self.arrived = True


def test_on_a_gpu_a_reading_is_of_the_steps_before_its_copy_and_is_never_waited_for():
    meter = Meter(torch.device("cpu"))
    live = LiveMeter(meter, every=2)
    device = PretendedDevice(live)
    meter.sums.copy_(torch.tensor([6.0, 3.0, NEVER]))
    assert live(1, 1) is None, "no copy is due"
    assert live(2, 2) is None, "the copy is on its way"
    meter.sums.copy_(torch.tensor([60.0, 30.0, 7.0]))
    assert live(4, 4) is None, "it still is, and no second one is queued over it"
    device.come_to_it()
    assert live(5, 5) == (Totals(6.0, 3.0, None), 2)
    assert live(6, 6) is None
    device.come_to_it()
    assert live(7, 7) == (Totals(60.0, 30.0, 7), 6)
    assert live(8, 8) is None
    live.forget()
    device.come_to_it()
    assert live(9, 9) is None, "the copy was of the epoch before"
