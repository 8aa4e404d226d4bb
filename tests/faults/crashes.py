"""Kills a run at each of its file-system calls, and at random times; it must go on to the same bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .calls import Fault, Watch, calls_of, kill, tear
from .harness import Attack, Trial, Undisturbed, fastcifar, in_child


def at_each_call(place: Path) -> dict[str, Trial]:
    """Kills a run, and one that goes on after its first epoch, before each call, and in the middle of each write."""
    undisturbed = Undisturbed.make(place)
    begun = half_way(undisturbed, place)

    def trial(fault: Fault, number: int, resumed: bool, folder: Path) -> str | None:
        run = folder / "run"
        if resumed:
            shutil.copytree(begun, run)
        in_child(watched(undisturbed, run, resumed, fault, number))
        return undisturbed.go_on(run)

    trials = {}
    for resumed, example in ((False, place / "watched"), (True, shutil.copytree(begun, place / "resumed"))):
        for number, call in enumerate(calls_of(action(undisturbed, example, resumed), example)):
            for fault in (kill, tear) if call.name == "write" else (kill,):
                name = f"{fault.__name__} {'train --resume' if resumed else 'train'} at call {number}, {call}"
                trials[name] = partial(trial, fault, number, resumed)
    return trials


def action(undisturbed: Undisturbed, run: Path, resumed: bool) -> Callable[[], int]:
    return fastcifar("train", "--resume", run) if resumed else undisturbed.train(run)


def watched(undisturbed: Undisturbed, run: Path, resumed: bool, fault: Fault, number: int) -> Callable[[], int]:
    def act() -> int:
        Watch(run, fault, number).start()
        return action(undisturbed, run, resumed)()

    return act


def half_way(undisturbed: Undisturbed, place: Path) -> Path:
    """A run that was killed in its second epoch."""
    run = place / "half"
    calls = calls_of(undisturbed.train(place / "counted"), place / "counted")
    published = [number for number, call in enumerate(calls) if call.path.endswith("checkpoints/latest")]
    in_child(watched(undisturbed, run, False, kill, published[-1]))
    return run


def at_random_times(place: Path) -> dict[str, Trial]:
    undisturbed = Undisturbed.make(place)

    def trial(number: int, times: int, folder: Path) -> str | None:
        run, draw = folder / "run", random.Random(number)
        for attempt in range(times):
            again = attempt and (run / "config.json").exists()
            in_child(action(undisturbed, run, again), draw.uniform(0.01, undisturbed.seconds))
        return undisturbed.go_on(run)

    return {f"killed {times} times by seed {seed}": partial(trial, seed, times) for times in (1, 2) for seed in range(100)}


ATTACKS = (
    Attack("killed at each file-system call", at_each_call, short=6, middle=60),
    Attack("killed at random, once and twice", at_random_times, short=4, middle=20),
)
