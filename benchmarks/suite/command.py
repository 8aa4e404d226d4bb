"""The command line of the suite."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from fastcifar.engine.run import commit, versions
from fastcifar.errors import FastcifarError, unknown
from suite.machine import this_machine
from suite.parts import PARTS, missing
from suite.records import PartFile, Settings, TestFile
from suite.runner import Call, carry_out, say

EXIT_UNFINISHED, EXIT_BAD_INPUT = 1, 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """What `arguments` ask for; for help and unknown flags, which argparse answers, it exits."""
    parser = argparse.ArgumentParser(prog="gpu_suite", description="All that only a GPU can tell, part by part, into files.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files; what it holds is not measured again")
    parser.add_argument("--only", nargs="+", metavar="PART", default=list(PARTS), help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a part may take; what is left of it is done by the next call")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=["*"], help="names or globs for time_to_accuracy; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="on a CPU, only what a CPU can do")
    parser.add_argument("--smoke", action="store_true", help="only see whether the parts run; the figures are of no use")
    parser.add_argument("--commit", help="to be written into the files, where the checkout does not tell")
    parser.add_argument("--dry-run", action="store_true", help="list the parts, and what they lack")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns 0 where all that was asked for is there, 1 where something failed or is left to do, 2 where nothing could be done."""
    given = parse(arguments)
    settings = Settings(given.device, given.smoke, tuple(given.recipes))
    try:
        for name in given.only:
            if name not in PARTS:
                raise FastcifarError(unknown("part", name, PARTS))
        if given.dry_run:
            return list_parts(given.only, settings)
        if given.device == "cuda" and not torch.cuda.is_available():
            raise FastcifarError("no GPU that torch can use was found; run the suite where there is one, or give --device cpu.")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        given.out.mkdir(parents=True, exist_ok=True)
        call = Call(given.out, settings, 60 * given.minutes, this_machine(given.device), versions(), given.commit or commit())
        found = [content for name in given.only if (content := carry_out(PARTS[name], call))]
    except FastcifarError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0 if all([finished(content) for content in found]) else EXIT_UNFINISHED


def list_parts(names: list[str], settings: Settings) -> int:
    """Prints what each part consists of, and what it lacks here."""
    for name in names:
        part = PARTS[name]
        say(f"{name:18}{len(part.chosen(settings)):4} items  {part.summary}")
        for what, why in missing(part.needs, settings).items():
            say(f"{'':30}skipped: it needs {what}, but {why}")
        for what, why in missing(part.uses, settings).items():
            say(f"{'':30}without {what}: {why}")
    return 0


def finished(content: PartFile) -> bool:
    """Whether nothing failed and nothing is left to do; says what, where it is not so."""
    for item, why in content.failures.items():
        say(f"{content.part}: {item} failed: {why}")
    failed = [row for row in content.rows if isinstance(row, TestFile) and row.failed]
    for row in failed:
        for test, why in row.failures.items():
            say(f"{content.part}: {row.file}, {test}: {why}")
    if content.state == "partial":
        say(f"{content.part}: not complete; the same call goes on.")
    return not content.failures and not failed and content.state == "complete"
