"""Flips one bit in a file of a checkpoint: neither training nor evaluation may go on with it in silence."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

from fastcifar.cli import EXIT_BAD_INPUT

from .crashes import half_way
from .harness import Attack, Trial, Undisturbed, fastcifar, in_child

FLIPS = 10
"""Bits of each file and command."""


def flipped_bits(place: Path) -> dict[str, Trial]:
    undisturbed = Undisturbed.make(place)
    commands = {"train --resume": half_way(undisturbed, place), "eval": undisturbed.run}

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


ATTACKS = (Attack("flipped bits in checkpoints", flipped_bits, short=4, middle=24),)
