"""Gives every numeric setting of the command line odd values: each works, or is refused in one sentence."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

from fastcifar.commands import COMMANDS
from fastcifar.models import ModelConfig
from fastcifar.optim import SHARPNESS, OptimConfig
from fastcifar.optim.schedules import ScheduleConfig
from fastcifar.settings import Setting, choices_of, settings_of

from .harness import Attack, Trial, Undisturbed, fastcifar, in_child

VALUES = ("", "0", "-1", "0.5", "nan", "inf", "-inf", "1e38", "1e400", "1e9", "1000000000", str(2**63), "٣")
TEXTS = {
    **dict.fromkeys(("warmup", "horizon", "step_size", "restart_period", "swa_start"), "{}ep"),
    "milestones": "{}%",
    "memory_limit": "{}GB",
    "augment": "cutout:{0}x{0}",
    "device": "cuda:{}",
    "dataset": "./pictures@{}",
}
"""Settings whose text holds a number, with such a text."""
SECONDS = 8.0
"""Of the processor's time, after which a run that goes well is asked to stop."""


def context(setting: Setting, teacher: Path) -> list[str]:
    """The flags under which a setting is read."""
    choices = [choice for choice, reads in choices_of(setting.part).items() if setting.name in reads]
    if setting.part is ModelConfig:
        return [] if "resnet" in choices or not choices else ["--arch", choices[0]]
    if setting.part is OptimConfig and choices:
        return ["--sharpness" if choices[0] in SHARPNESS else "--optimizer", choices[0]]
    if setting.part is ScheduleConfig and choices:
        return ["--schedule", choices[0]]
    return ["--teacher", str(teacher)] if choices == ["a teacher's"] else ["--loss", choices[-1]] if choices else []


def trial(arguments: list[str], folder: Path) -> str | None:
    def act() -> int:
        os.chdir(folder)
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        return fastcifar(*arguments)()

    return in_child(act, 8 * SECONDS).fault


def odd_numbers(place: Path) -> dict[str, Trial]:
    run, trials = Undisturbed.make(place), {}
    data, small = run.arguments[1:3], ("--blocks", "1", "--channels", "4")
    own = {"train": run.arguments[1:-1], "profile": run.arguments[1:-1], "count": [], "preview": ["standard", *data]}
    for command, setting in [(name, setting) for name in own for setting in settings_of(COMMANDS[name])]:
        if setting.kind not in (int, float) and setting.name not in TEXTS:
            continue
        if command == "profile" and setting.name != "steps":
            continue  # the others are those of `train`
        around = context(setting, run.run)
        flags = [flag for flag in own[command] if "--arch" not in around or flag not in small]
        for value in VALUES:
            text = TEXTS.get(setting.name, "{}").format(value)
            given = [command, *flags, *around, setting.flags[0], text]
            trials[" ".join([command, *around, setting.flags[0], repr(text)])] = partial(trial, given)
    return trials


KEPT = (
    "train --batch-size '9223372036854775808'",
    "train --epochs '9223372036854775808'",
    "train --stem-stride '1000000000'",
    "profile --steps '1000000000'",
)
ATTACKS = (Attack("odd numbers", odd_numbers, short=12, middle=100, kept=KEPT),)
