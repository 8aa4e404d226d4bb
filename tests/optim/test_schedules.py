"""Schedules against torch's own at every step, and the lengths they are given in."""

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from fastcifar.errors import ConfigError
from fastcifar.optim.schedules import Duration, lr_table


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 97), (1, 10), (7, 100), (99, 100)])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_equals_torchs_schedulers_at_every_step(schedule, warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    after = (
        CosineAnnealingLR(optimizer, T_max=total - warmup) if schedule == "cosine" else ConstantLR(optimizer, factor=1.0, total_iters=total)
    )
    scheduler = after
    if warmup:
        rising = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(1, warmup - 1))
        scheduler = SequentialLR(optimizer, [rising, after], milestones=[warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    table = lr_table(schedule, 0.4, warmup, total)
    assert table == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_cosine_ends_near_zero_and_peaks_after_the_warmup():
    table = lr_table("cosine", 1.0, 10, 1000)
    assert table[9] == table[10] == max(table) == 1.0
    assert 0 < table[-1] < 1e-5


@pytest.mark.parametrize(("text", "steps"), [("5ep", 500), ("0.5ep", 50), ("2000st", 2000), ("5%", 1000), ("0%", 0), ("12.5%", 2500)])
def test_durations(text, steps):
    assert Duration.parse(text).steps(100, 20_000) == steps


@pytest.mark.parametrize("text", ["", "5", "ep", "-1ep", "5 epochs", "5%%", "nan%"])
def test_what_is_no_duration_says_how_to_write_one(text):
    with pytest.raises(ConfigError, match="5ep"):
        Duration.parse(text)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match="shorten --warmup"):
        lr_table("cosine", 0.1, 10, 10)
