"""Attacks the package: ``python -m tests.faults [--most N] [ATTACK...]`` prints what was tried, and what survived."""

from __future__ import annotations

import argparse
import sys

from . import crashes, disk

ATTACKS = {attack.name: attack for module in (crashes, disk) for attack in module.ATTACKS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Attacks the package, and counts what it survives.")
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="; ".join(ATTACKS))
    parser.add_argument("--most", type=int, help="trials of each attack; all by default")
    given = parser.parse_args()
    broken = False
    for name in given.attacks or ATTACKS:
        tried, failures = ATTACKS[name].run(given.most)
        print(f"| {name} | {tried:,} | {tried - len(failures):,} |", flush=True)
        for trial, fault in failures.items():
            broken = True
            print(f"  {trial}: {fault}", file=sys.stderr, flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
