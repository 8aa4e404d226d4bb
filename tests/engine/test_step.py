"""The meter of an epoch, read while the epoch is under way: a loss that is not finite is noticed soon, and nothing
waits.
"""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, image_set

from fastcifar.config import OptimConfig, ScheduleConfig
from fastcifar.engine.step import LiveMeter, Meter, Reading, Totals
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import FastcifarError
from fastcifar.kernels.bookkeeping import NEVER


def test_a_loss_that_is_not_finite_ends_the_epoch_within_some_steps():
    config = replace(CONFIG, optim=OptimConfig(lr=1e20), schedule=ScheduleConfig("constant", warmup="0%"))
    trainer = Trainer(config, image_set(2000))
    with pytest.raises(FastcifarError, match=r"infinite or NaN at step [1-9] of 200 \(epoch 1, lr 1e\+20\)"):
        trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)
    assert trainer.batch == trainer.live_meter.every == 16


def test_the_running_loss_and_accuracy_are_those_of_this_epoch_so_far():
    trainer, seen = Trainer(CONFIG, image_set(800)), []
    for _ in range(2):
        trainer.run_epoch(stop=lambda: False, tick=lambda batch: seen.append((batch, trainer.running)))
        totals = trainer.meter.read()
        assert seen[14][1] is None, "nothing is known of an epoch before its first reading"
        assert seen[15][1] != seen[31][1]
        assert seen[31][1] == seen[-1][1]
        loss, accuracy = seen[-1][1]
        assert loss * 32 / 40 < totals.loss / 800
        assert accuracy * 32 / 40 <= totals.correct / 800
        seen.clear()


class PretendedDevice:
    """What a GPU does with a copy that is queued: it arrives when the device comes to it."""

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
    assert live(5, 5) == Reading(Totals(6.0, 3.0, None), steps=2)
    assert live(6, 6) is None
    device.come_to_it()
    assert live(7, 7) == Reading(Totals(60.0, 30.0, 7), steps=6)


def test_a_copy_of_the_epoch_before_is_not_taken_for_one_of_this():
    live = LiveMeter(Meter(torch.device("cpu")), every=1)
    device = PretendedDevice(live)
    assert live(1, 1) is None
    live.forget()
    device.come_to_it()
    assert live(1, 1) is None
