"""Lets memory run out in every command, at several places: each works, or says so in one sentence."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from .harness import FLAGS, Attack, Trial, Undisturbed, fastcifar, in_child

ROOM = (4, 16, 48, 128)
"""MiB beyond what the process has when the command begins."""


def short_of_memory(place: Path) -> dict[str, Trial]:
    undisturbed = Undisturbed.make(place)
    data = undisturbed.arguments[1:3]
    large = [*FLAGS, "--channels", "512"]
    commands = {
        "train": ["train", *data, *large],
        "train --resume": ["train", "--resume", "run", "--epochs", 4],
        "plan": ["plan", *data, *large],
        "profile": ["profile", *data, *large],
        "eval": ["eval", "run", "--tta", "mirror-shift"],
        "predict": ["predict", "run", "--images", place / "images.npy"],
        "ensemble": ["ensemble", "run", "run"],
        "export --format torch": ["export", "run", "--format", "torch"],
        "preview": ["preview", *data, "--count", 64],
    }

    def trial(arguments: list, room: int, folder: Path) -> str | None:
        shutil.copytree(undisturbed.run, folder / "run")
        os.chdir(folder)
        return in_child(fastcifar(*arguments), memory=room * 2**20).fault

    return {f"{name}, {room} MiB": partial(trial, words, room) for name, words in commands.items() for room in ROOM}


ATTACKS = (Attack("out of memory", short_of_memory, short=2, middle=14),)
