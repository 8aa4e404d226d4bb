"""When compiling pays, how that is remembered, and what cannot be captured."""

from dataclasses import replace

import pytest
import torch
from small_training import CONFIG
from torch import nn

from fastcifar.config import LossConfig, ModelConfig, OptimConfig
from fastcifar.engine.compile import Obstacle, Why, mark_of, obstacle_to_capture, obstacle_to_compiling
from fastcifar.optim.optimizers import build_optimizer


@pytest.mark.parametrize(
    ("device", "step_seconds", "steps", "cached", "compiles"),
    [
        ("cpu", 0.5, 100, False, False),  # 50 s, of which compiling would win back 12
        ("cpu", 0.5, 100, True, True),
        ("cpu", 0.1, 19_500, False, True),
        ("cuda", 0.0004, 78_000, False, False),  # resnet20_v2 for 200 epochs on a fast card: 31 s in all
        ("cuda", 0.002, 78_000, False, False),  # resnet_prop there: 156 s, a twentieth of which is less than 40
        ("cuda", 0.002, 78_000, True, True),
        ("cuda", 0.02, 78_000, False, True),  # and on a slow card
    ],
)
def test_compiling_has_to_win_back_its_time(device, step_seconds, steps, cached, compiles):
    found = obstacle_to_compiling("auto", steps, lambda: step_seconds, device, cached)
    cost = 4.0 if cached else 40.0
    expected = Obstacle(Why.DOES_NOT_PAY, training_seconds=step_seconds * steps, compile_seconds=cost)
    assert found == (None if compiles else expected)


@pytest.mark.parametrize(
    ("requested", "steps", "expected"),
    [("on", 1, None), ("off", 1, Obstacle(Why.ASKED)), ("on", 0, Obstacle(Why.NO_STEP_LEFT))],
)
def test_what_was_asked_for_is_not_timed(requested, steps, expected):
    assert obstacle_to_compiling(requested, steps, lambda: 1 / 0, "cpu", cached=False) == expected


def test_marks_tell_apart_what_compiles_differently():
    device = torch.device("cpu")
    other = replace(CONFIG, batch_size=21), replace(CONFIG, loss=LossConfig()), replace(CONFIG, model=ModelConfig())
    assert len({mark_of(config, device) for config in (CONFIG, *other)}) == 4
    assert mark_of(replace(CONFIG, seed=9, epochs=99), device) == mark_of(CONFIG, device)


@pytest.mark.parametrize(
    ("name", "expected"), [("adam", None), ("muon", None), ("rmsprop", Obstacle(Why.OVERFLOW_CHECK, "RMSprop"))]
)
def test_what_waits_in_the_middle_of_a_step_is_not_captured(name, expected):
    optimizer = build_optimizer(nn.Linear(3, 2), OptimConfig(name))
    scaled, plain = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    assert obstacle_to_capture(optimizer, scaled, 100) == expected
    assert obstacle_to_capture(optimizer, plain, 100) is None
    assert obstacle_to_capture(optimizer, plain, 2) == Obstacle(Why.SHORT_RUN)
