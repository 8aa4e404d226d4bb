"""Attacks the package: ``python -m tests.faults [--most N] [ATTACK...]`` prints what was tried, and what survived."""

from __future__ import annotations

import argparse
import sys

from . import crashes, disk, flips, fuzz, memory, odd_numbers, parity

ATTACKS = {attack.name: attack for module in (crashes, disk, fuzz, odd_numbers, memory, flips, parity) for attack in module.ATTACKS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Attacks the package, and counts what it survives.")
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="; ".join(ATTACKS))
    parser.add_argument("--most", type=int, help="trials of each attack; all by default")
    given = parser.parse_args()
    broken = 0
    for name in given.attacks or ATTACKS:
        tried = survived = 0
        for trial, fault in ATTACKS[name].run(given.most):
            tried, survived = tried + 1, survived + (fault is None)
            if fault:
                print(f"  {trial}: {fault}", file=sys.stderr, flush=True)
        broken += tried - survived
        print(f"| {name} | {tried:,} | {survived:,} |", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
