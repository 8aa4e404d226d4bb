"""Runs a part: its items one after another until they are done or the time is up, with the file rewritten after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastcifar.errors import FastcifarError
from fastcifar.runs.files import reason
from suite.parts import Part, missing
from suite.records import Machine, PartFile, Settings, read_part, read_rows, schema_of, write_part

BENCHMARKS = Path(__file__).resolve().parents[1]
LOG_LINES = 15
"""Of an item that failed, shown."""


@dataclass(frozen=True)
class Call:
    """What one call of the suite has to do with every part."""

    out: Path
    settings: Settings
    seconds: float
    """That a part may take."""
    machine: Machine
    versions: dict[str, str]
    commit: str | None

    def path_of(self, part: Part) -> Path:
        return self.out / f"{self.machine.slug}_{part.name}.json"


class Stopped(Exception):
    """An item ran out of time."""


class Failed(Exception):
    """An item failed; the text is what it said last, and `rows` are those that it left all the same."""

    def __init__(self, text: str, rows: list[Any]) -> None:
        super().__init__(text)
        self.rows = rows


def carry_out(part: Part, call: Call) -> PartFile | None:
    """What the file holds in the end: items that it holds already are not measured again. None where the part had to be skipped.

    Raises:
        FastcifarError: the file is damaged, or of another card, commit or kind of measurement; or it cannot be written.
    """
    lacking = missing(part.needs, call.settings)
    if lacking:
        say(f"{part.name}: skipped, since it needs {'; '.join(f'{name}, but {why}' for name, why in lacking.items())}.")
        return None
    content = begin(part, call)
    left = remaining(part, call, content)
    if not left:
        say(f"{part.name}: done already, by {content.commit or 'an unknown commit'}.")
        return content
    deadline = time.monotonic() + call.seconds
    for item in left:
        available = deadline - time.monotonic()
        if available <= 0 or not fits(part, content, item, available):
            break
        content = measured(part, call, content, item, available, alone=item == left[0])
        write_part(call.path_of(part), content)
    content = replace(content, state="partial" if remaining(part, call, content) else "complete")
    write_part(call.path_of(part), content)
    return content


def begin(part: Part, call: Call) -> PartFile:
    """What an earlier call left, or a file with no rows yet. Raises FastcifarError where it would not go with what is measured now."""
    path = call.path_of(part)
    fresh = PartFile(schema_of(part.row), part.name, "partial", now(), call.machine, call.versions, call.commit, call.settings)
    if not path.exists():
        return replace(fresh, skipped=missing(part.uses, call.settings))
    found = read_part(path, part.name, part.row)
    differing = [name for name in ("machine", "versions", "commit") if getattr(found, name) != getattr(fresh, name)]
    if found.settings.smoke != call.settings.smoke:
        kind = "with" if found.settings.smoke else "without"
        raise FastcifarError(f"{path} was made {kind} --smoke; choose another --out, or remove it.")
    if differing and remaining(part, call, found):
        raise FastcifarError(f"{path} was begun with another {' and '.join(differing)}; choose another --out, or remove it.")
    return replace(found, settings=call.settings)


def remaining(part: Part, call: Call, content: PartFile) -> list[str]:
    """The items still to be measured."""
    return [item for item in part.chosen(call.settings) if item not in content.items and item not in content.failures]


def fits(part: Part, content: PartFile, item: str, available: float) -> bool:
    """Whether `item` should be done within `available` seconds, by what the costliest before it took; True where that is not known."""
    if part.cost is None or not content.items:
        return True
    last = max(content.items, key=part.cost)
    expected = content.items[last] / part.cost(last) * part.cost(item)
    if expected > available:
        say(f"{part.name}: {item} should take some {expected:,.0f} s, and {available:,.0f} s are left; a call with more --minutes goes on.")
    return expected <= available


def measured(part: Part, call: Call, content: PartFile, item: str, available: float, *, alone: bool) -> PartFile:
    """`content` with `item` measured; unchanged where it ran out of time, unless it had the time of the part all for itself (`alone`)."""
    start = time.monotonic()
    try:
        rows = run_item(part, item, call.settings, available)
    except Stopped:
        say(f"{part.name}: {item} stopped, after {time.monotonic() - start:,.0f} s.")
        failures = {item: f"not done within {available:,.0f} s"} if alone else {}
        return replace(content, failures=content.failures | failures, date=now())
    except Failed as error:
        say(f"{part.name}: {item} failed.")
        failures = {item: str(error)}
        return replace(content, failures=content.failures | failures, rows=content.rows + of(call, error.rows), date=now())
    seconds = time.monotonic() - start
    say(f"{part.name}: {item}, {len(rows)} rows in {seconds:,.0f} s.")
    return replace(content, items=content.items | {item: seconds}, rows=content.rows + of(call, rows), date=now())


def of(call: Call, rows: list[Any]) -> list[Any]:
    """`rows` with the commit of the call, where they name one."""
    return [replace(row, commit=call.commit) if hasattr(row, "commit") else row for row in rows]


def run_item(part: Part, item: str, settings: Settings, available: float) -> list[Any]:
    """The rows of `item`, measured in a process of its own, which is ended with all that it started when the time is up.

    Raises:
        Stopped: the time was up.
        Failed: the process ended with an error.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_suite-") as name, open(Path(name, "log"), "w") as log:
        arguments = [part.target, item, json.dumps(asdict(settings)), name]
        process = subprocess.Popen(
            [sys.executable, "-m", "suite.child", *arguments],
            env=environment(settings),
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = process.wait(available)
        except subprocess.TimeoutExpired as error:
            raise Stopped from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        left = Path(name, "rows.json")
        rows = read_rows(left, part.row) if left.exists() else []
        if status:
            raise Failed(last_words(Path(log.name).read_text(errors="replace"), status), rows)
        return rows


def environment(settings: Settings) -> dict[str, str]:
    """In which an item finds the modules beside this one, and no GPU where the CPU was chosen."""
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if settings.device == "cpu" else {}
    return {**os.environ, **hidden, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def last_words(log: str, status: int) -> str:
    """What a process that failed said last; more of it is printed."""
    lines = [line for line in log.splitlines() if line.strip()] or [f"exit status {status}"]
    print(*(f"    {line}" for line in lines[-LOG_LINES:]), sep="\n", file=sys.stderr)
    return reason(RuntimeError(lines[-1]))


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def say(line: str) -> None:
    print(line, flush=True)
