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
    begun, ended = half_way(undisturbed, place), place / "run"
    commands = {"train --resume": (begun, "train", "--resume"), "eval": (ended, "eval")}

    def trial(command: str, file: Path, number: int, folder: Path) -> str | None:
        source, *words = commands[command]
        run = shutil.copytree(source, folder / "run")
        content = bytearray((run / file).read_bytes())
        bit = random.Random(f"{file} {number}").randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (run / file).write_bytes(content)
        found = in_child(fastcifar(*words, run))
        return found.fault or (None if found.status == EXIT_BAD_INPUT else f"bit {bit} was not noticed")

    return {
        f"{command} with bit {number} of {file}": partial(trial, command, file, number)
        for command, (source, *_) in commands.items()
        for file in (path.relative_to(source) for path in sorted(source.glob("checkpoints/*/*")))
        for number in range(FLIPS)
    }


ATTACKS = (Attack("flipped bits in checkpoints", flipped_bits, short=6, middle=40),)
