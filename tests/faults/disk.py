"""Has each file-system call of a run meet an error of the disk, once or from there on."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

from .calls import Fault, Watch, calls_of, fail, short
from .harness import Attack, Trial, Undisturbed, in_child

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}


def faults_of(call) -> dict[str, tuple[Fault, bool]]:
    """The faults that a call can meet, with whether they last."""
    names = ("ENOSPC", "EIO") if call.writes else ("EIO",)
    names = (*names, "EACCES") if call.by_path else names
    faults = {name: (fail(ERRORS[name]), False) for name in names}
    if call.name == "write":
        faults |= {"a short write": (short, False), "ENOSPC from there on": (fail(errno.ENOSPC), True)}
    return faults


def at_each_call(place: Path) -> dict[str, Trial]:
    undisturbed = Undisturbed.make(place)

    def trial(fault: Fault, lasting: bool, number: int, folder: Path) -> str | None:
        run = folder / "run"

        def act() -> int:
            Watch(run, fault, number, lasting).start()
            return undisturbed.train(run)()

        ended = in_child(act)
        return ended.fault or undisturbed.go_on(run)

    return {
        f"{name} at call {number}, {call}": partial(trial, fault, lasting, number)
        for number, call in enumerate(calls_of(undisturbed.train(place / "watched"), place / "watched"))
        for name, (fault, lasting) in faults_of(call).items()
    }


ATTACKS = (Attack("errors of the disk", at_each_call, short=6, middle=60),)
