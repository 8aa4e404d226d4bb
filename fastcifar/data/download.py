"""Fetches a file of known size and md5 over HTTP; pooch checks it, and it appears whole or not at all."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pooch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fastcifar.errors import DataError, reason
from fastcifar.output import printable

WINDOW = 10.0
"""The rate is measured anew every so many seconds, so an address that falls silent is left within twice as many."""
PATIENCE = 300.0
"""An address at which the file would take more seconds than this is left for another one."""
LAST_PATIENCE = 3 * 3600.0
"""The same where no better one is known."""
CHUNK = 2**18
"""Most bytes read at once."""


class SlowAddress(Exception):
    """An address serves too slowly, at `rate` bytes per second."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"too slow, {rate / 1000:.0f} kB/s")
        self.rate = rate


def download(addresses: Sequence[str], target: Path, md5: str, size: int, deadline_seconds: float = math.inf) -> None:
    """Fetches `target` from the first of `addresses` that serves it whole; returns at once where it exists.

    An address at which the file would take longer than five minutes, or than the deadline allows, is left for the next
    one; if none is better, and there is time, the fastest of them gets three hours. Each address starts from the
    beginning. Processes that want the same target take turns, and each sweeps away what a killed one has left.

    Args:
        addresses: in order of preference.
        target: the file to make; its folder is made too.
        md5: of the whole file, in hexadecimal.
        size: bytes in the file; no more are ever read.
        deadline_seconds: for the whole download.

    Raises:
        DataError: no address served the file, or none in time, or the folder cannot be written.
    """
    deadline = time.monotonic() + deadline_seconds
    partial = target.with_name(f".{target.name}.partial")
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock.acquire(-1 if math.isinf(deadline) else deadline_seconds):
            if target.exists():
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                problem = fetch(addresses, partial / target.name, md5, size, deadline)
                if not problem:
                    os.replace(partial / target.name, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        problem = f"another process has been fetching it for {deadline_seconds:g} s"
    except OSError as error:
        message = f"cannot write into {target.parent} ({reason(error)}); make it writable, or name another folder."
        raise DataError(message) from None
    if problem:
        advice = f"put the file into {target.parent}, or use --dataset synthetic"
        raise DataError(f"could not fetch {target.name} ({problem}); {advice}.")


def fetch(addresses: Sequence[str], target: Path, md5: str, size: int, deadline: float) -> str:
    """Returns what went wrong at each address; nothing where one served `target`."""
    pooch.get_logger().setLevel(logging.WARNING)
    problems: list[str] = []
    slow: dict[str, float] = {}
    with bar() as progress:
        task = progress.add_task(f"fetching {target.name}", total=size)
        for address, patience in attempts(addresses, slow, deadline):
            seconds = min(patience, deadline - time.monotonic())
            downloader = Downloader(size, seconds, lambda count: progress.update(task, completed=count))
            try:
                # pooch's type for a downloader also takes check_only, which retrieve never passes.
                pooch.retrieve(address, f"md5:{md5}", target.name, target.parent, downloader=downloader)  # pyright: ignore[reportArgumentType]
                return ""
            except SlowAddress as error:
                slow[address] = error.rate
                problems.append(f"{address}: {error}")
            except Exception as error:  # on hostile bytes, urllib raises nearly anything
                problems.append(f"{address}: {why(error)}")
    return ", ".join(problems) or "no address is known"


def attempts(addresses: Sequence[str], slow: dict[str, float], deadline: float) -> Iterator[tuple[str, float]]:
    """Yields each address with its time limit in seconds, then those found `slow`, fastest first, with the last one."""
    for number, address in enumerate(addresses, start=1):
        if time.monotonic() < deadline:
            yield address, PATIENCE if slow or number < len(addresses) else LAST_PATIENCE
    if deadline - time.monotonic() > PATIENCE:
        for address in sorted(slow, key=slow.__getitem__, reverse=True):
            yield address, LAST_PATIENCE


def why(error: Exception) -> str:
    """The cause of `error`, without pooch's advice, urllib's wrapping, and what a terminal would act on."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else None
    return printable(reason(inner if isinstance(inner, Exception) else error).split(". ")[0])


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
class Downloader:
    """A downloader for pooch that watches the clock while another thread waits for the server.

    A server that trickles its redirects, headers or contents can hold up pooch's own one for any time.
    """

    size: int
    seconds: float
    """Most seconds for the file."""
    report: Callable[[int], None]

    def __call__(self, url: str, output_file: str, _: object) -> None:
        """Raises SlowAddress, or an error of urllib."""
        os.chmod(output_file, 0o644)  # pooch makes it for its owner alone
        transfer = Transfer(url, output_file, self.size)
        began, before, window = time.monotonic(), 0, min(WINDOW, self.seconds / 4)
        end = began + self.seconds
        transfer.start()
        try:
            while transfer.is_alive():
                transfer.join(0.05)
                now, received = time.monotonic(), transfer.received
                self.report(received)
                if now - began > window:
                    rate = (received - before) / (now - began)
                    if self.size - received > rate * (end - now):
                        raise SlowAddress(rate)
                    began, before = now, received
        finally:
            transfer.abandoned = True
        if transfer.error is not None:
            raise transfer.error


class Transfer(Thread):
    """Copies the first `size` bytes that `url` serves into a file, until it is abandoned."""

    def __init__(self, url: str, file: str, size: int) -> None:
        super().__init__(daemon=True)
        self.url, self.file, self.size = url, file, size
        self.received = 0
        self.abandoned = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.copy()
        except Exception as error:  # raised again by who waits
            self.error = error

    def copy(self) -> None:
        request = urllib.request.Request(self.url, headers={"User-Agent": "fastcifar"})
        with open(self.file, "wb") as file, urllib.request.urlopen(request, timeout=WINDOW) as response:
            while self.received < self.size and not self.abandoned:
                chunk = response.read1(min(CHUNK, self.size - self.received))
                if not chunk:
                    raise ConnectionError(f"the connection broke off after {self.received} of {self.size} bytes")
                file.write(chunk)
                self.received += len(chunk)
