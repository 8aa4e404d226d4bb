"""Fetches a file of known size and md5 over HTTP; pooch checks it and publishes it atomically."""

from __future__ import annotations

import http.client
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastcifar.errors import DataError, reason

TIMEOUT = 10.0
"""Seconds until a silent connection is given up."""
MEASURING = 5.0
"""Most seconds of measuring before the rate is judged."""
PATIENCE = 300.0
"""If the rest of the file would take more seconds than this, another address is tried."""
CHUNK = 2**18
"""Bytes read at once."""


class TooSlow(DataError):
    """The file would not arrive within the deadline."""


class SlowAddress(Exception):
    """An address serves too slowly, at `rate` bytes per second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


def download(addresses: Sequence[str], target: Path, md5: str, size: int, deadline_seconds: float = math.inf) -> None:
    """Fetches `target` from the first of `addresses` that serves it whole; returns at once where it exists.

    An address at which the rest would take longer than five minutes, or than the deadline allows, is left for the next
    one; if none is better, and there is time, for the fastest of them. Each address starts from the beginning: pooch
    keeps no part of a file. Processes that want the same target take turns.

    Args:
        addresses: in order of preference.
        target: the file to make; its folder is made too.
        md5: of the whole file, in hexadecimal.
        size: bytes in the file; no more are ever written.
        deadline_seconds: for the whole download; judged once a rate was measured for at most 5 s.

    Raises:
        TooSlow: it would take longer than `deadline_seconds` from every address.
        DataError: no address served the file, or the folder cannot be written.
    """
    deadline = time.monotonic() + deadline_seconds
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(-1 if math.isinf(deadline) else deadline_seconds):
            arrived = target.exists() or fetch(addresses, target, md5, size, deadline)
    except Timeout:
        arrived = False
    except OSError as error:
        message = f"cannot write into {target.parent} ({reason(error)}); make it writable, or name another folder."
        raise DataError(message) from None
    if not arrived:
        raise TooSlow(
            f"the download would take longer than {deadline_seconds:g} s; run again without haste, or use --dataset "
            "synthetic."
        )


def fetch(addresses: Sequence[str], target: Path, md5: str, size: int, deadline: float) -> bool:
    """Returns whether an address served `target` in time. Raises DataError where every address failed."""
    pooch.get_logger().setLevel(logging.WARNING)
    failures: list[str] = []
    slow: dict[str, float] = {}
    with bar() as progress:
        task = progress.add_task(f"fetching {target.name}", total=size)
        for address, patience in attempts(addresses, slow, deadline):
            connection = Connection(size, patience, deadline, lambda count: progress.update(task, completed=count))
            try:
                # pooch's type for a downloader also takes check_only, which retrieve never passes.
                pooch.retrieve(address, f"md5:{md5}", target.name, target.parent, downloader=connection)  # pyright: ignore[reportArgumentType]
                return True
            except SlowAddress as found:
                slow[address] = found.rate
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f"{address}: {why(error)}")
    if slow or time.monotonic() > deadline:
        return False
    reasons = ", ".join(failures) or "no address is known"
    raise DataError(
        f"could not fetch {target.name} ({reasons}); put the file into {target.parent}, or use --dataset synthetic."
    )


def attempts(addresses: Sequence[str], slow: dict[str, float], deadline: float) -> Iterator[tuple[str, float]]:
    """Yields each address with its time limit in seconds, then those found `slow`, fastest first, without the limit."""
    for number, address in enumerate(addresses, start=1):
        yield address, math.inf if number == len(addresses) and not slow else PATIENCE
    if deadline - time.monotonic() > PATIENCE:
        for address in sorted(slow, key=slow.__getitem__, reverse=True):
            del slow[address]
            yield address, math.inf


def why(error: Exception) -> str:
    """The cause of `error`, without pooch's advice and urllib's wrapping."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else None
    return reason(inner if isinstance(inner, Exception) else error).split(". ")[0]


def bar() -> Progress:
    """A progress bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@dataclass(frozen=True)
class Connection:
    """A downloader for pooch that checks the clock whenever data has arrived.

    Pooch's own one reads whole chunks, so a server that trickles could take any time.
    """

    size: int
    patience: float
    """Most seconds for the rest of the file."""
    deadline: float
    """The end of the whole download on the monotonic clock."""
    report: Callable[[int], None]

    def __call__(self, url: str, output_file: str, _: object) -> None:
        """Raises SlowAddress, or an error of urllib."""
        left = self.deadline - time.monotonic()
        request = urllib.request.Request(url, headers={"User-Agent": "fastcifar"})
        with urllib.request.urlopen(request, timeout=min(TIMEOUT, max(left, 0.1))) as response:
            self.copy(response, Path(output_file), measuring=min(MEASURING, left / 4))

    def copy(self, response: http.client.HTTPResponse, output_file: Path, measuring: float) -> None:
        received, began = 0, time.monotonic()
        output_file.chmod(0o644)  # pooch makes it for its owner alone
        with output_file.open("wb") as file:
            while chunk := response.read1(CHUNK):
                received += len(chunk)
                if received > self.size:
                    raise ConnectionError(f"sends more than the {self.size} bytes of the file")
                file.write(chunk)
                self.report(received)
                now = time.monotonic()
                rate = received / (now - began) if now - began > measuring else math.inf
                if self.size - received > rate * min(self.patience, self.deadline - now):
                    raise SlowAddress(rate)
        if received < self.size:
            raise ConnectionError(f"the connection broke off after {received} of {self.size} bytes")
