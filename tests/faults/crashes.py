"""Kills runs, has the disk fail at each of their calls, and flips bits of their checkpoints: nothing is lost."""

from __future__ import annotations

import errno
import random
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from fastcifar.cli import EXIT_BAD_INPUT

from .calls import Call, Fault, Watch, calls_of, fail, kill, shorten, tear
from .harness import Attack, Trial, Undisturbed, fastcifar, in_child

RANDOM, FLIPS = 100, 10
"""How many runs are killed at a random time, and how many are so twice; bits flipped in each file and command."""


def killed(call: Call) -> dict[str, tuple[Fault, bool]]:
    """The ways to be killed at a call, of which none lasts."""
    return {"killed": (kill, False)} | ({"killed in the middle": (tear, False)} if call.name == "write" else {})


def failing(call: Call) -> dict[str, tuple[Fault, bool]]:
    """The ways in which the disk fails at a call, and whether it goes on failing."""
    faults = {"EIO": (fail(errno.EIO), False)}
    if call.changes:
        faults |= {"ENOSPC": (fail(errno.ENOSPC), False), "ENOSPC from there on": (fail(errno.ENOSPC), True)}
    if call.name == "write":
        return faults | {"a short write": (shorten, False)}
    return faults if call.name in ("read", "fsync") else faults | {"EACCES": (fail(errno.EACCES), False)}


def at_each_call(faults_of: Callable[[Call], dict[str, tuple[Fault, bool]]], place: Path) -> dict[str, Trial]:
    """Attacks a run, and one that goes on after its first epoch."""
    undisturbed = Undisturbed.make(place)
    begun = half_way(place)

    def trial(fault: Fault, lasting: bool, number: int, resumes: bool, folder: Path) -> str | None:
        run = shutil.copytree(begun, folder / "run") if resumes else folder / "run"
        ended = in_child(watched(undisturbed.command(run, resumes), Watch(run, fault, number, lasting)))
        if faults_of is failing:
            return ended.fault or undisturbed.go_on(run, without_points=True)
        return undisturbed.go_on(run)

    trials = {}
    for resumes in (False, True):
        for number, call in enumerate(calls_made(place, resumes)):
            for name, (fault, lasting) in faults_of(call).items():
                which = "train --resume" if resumes else "train"
                trials[f"{name} at call {number} of {which}, {call}"] = partial(trial, fault, lasting, number, resumes)
    return trials


def watched(command: Callable[[], int], watch: Watch) -> Callable[[], int]:
    def act() -> int:
        watch.start()
        return command()

    return act


@cache
def calls_made(place: Path, resumes: bool) -> list[Call]:
    """The calls of a run, or of one that goes on after its first epoch."""
    run = shutil.copytree(half_way(place), place / "resumed") if resumes else place / "watched"
    return calls_of(Undisturbed.make(place).command(run, resumes), run)


@cache
def half_way(place: Path) -> Path:
    """A run that was killed in its second epoch."""
    run = place / "half"
    calls = map(str, calls_made(place, resumes=False))
    last = max(number for number, call in enumerate(calls) if re.fullmatch(r"replace checkpoints/\.\d+\.partial", call))
    in_child(watched(Undisturbed.make(place).command(run), Watch(run, kill, last)))
    return run


def at_random_times(place: Path) -> dict[str, Trial]:
    undisturbed = Undisturbed.make(place)

    def trial(times: int, number: int, folder: Path) -> str | None:
        run, draw = folder / "run", random.Random(number)
        for _ in range(times):
            in_child(undisturbed.command(run, (run / "config.json").exists()), draw.uniform(0.01, undisturbed.seconds))
        return undisturbed.go_on(run)

    each = ((times, number) for times in (1, 2) for number in range(RANDOM))
    return {f"killed {times} times, number {number}": partial(trial, times, number) for times, number in each}


def flipped_bits(place: Path) -> dict[str, Trial]:
    commands = {"train --resume": half_way(place), "eval": Undisturbed.make(place).run}

    def trial(command: str, file: Path, number: int, folder: Path) -> str | None:
        run = shutil.copytree(commands[command], folder / "run")
        content = bytearray((run / file).read_bytes())
        bit = random.Random(f"{file} {number}").randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (run / file).write_bytes(content)
        ended = in_child(fastcifar(*command.split(), run))
        return ended.fault or (None if ended.status == EXIT_BAD_INPUT else f"bit {bit} was not noticed")

    return {
        f"{command} with bit {number} of {file}": partial(trial, command, file, number)
        for command, run in commands.items()
        for file in (path.relative_to(run) for path in sorted(run.glob("checkpoints/[0-9]*/*")))
        for number in range(FLIPS)
    }


ATTACKS = (
    Attack("killed at each file-system call", partial(at_each_call, killed), short=4, middle=36),
    Attack("killed at random, once and twice", at_random_times, short=2, middle=12),
    Attack("flipped bits in checkpoints", flipped_bits, short=3, middle=20),
    Attack("errors of the disk at each call", partial(at_each_call, failing), short=4, middle=44),
)
