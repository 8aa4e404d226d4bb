"""Attacks the package: ``python -m tests.faults [--form FORM] [ATTACK...]`` prints what was tried and what survived."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from . import crashes, fuzz, memory, mirrors, odd_numbers, parity

MODULES = (crashes, fuzz, odd_numbers, memory, mirrors, parity)
ATTACKS = {attack.name: attack for module in MODULES for attack in module.ATTACKS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="; ".join(ATTACKS))
    parser.add_argument("--form", choices=("short", "middle", "long"), default="long", help="how much is tried")
    given = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as place:
        for name in given.attacks or ATTACKS:
            attack, tried, survived = ATTACKS[name], 0, 0
            most = {"short": attack.short, "middle": attack.middle, "long": None}[given.form]
            for trial, fault in attack.run(Path(place), most):
                tried, survived = tried + 1, survived + (fault is None)
                if fault:
                    print(f"{name}: {trial}: {fault}", file=sys.stderr, flush=True)
            broken += tried - survived
            print(f"| {name} | {tried:,} | {survived:,} |", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
