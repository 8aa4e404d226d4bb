"""Fetches one file over HTTP, with nothing but the standard library: resumable, checked, and published by one
rename.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from fastcifar.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

Progress = Callable[[int, int | None], None]
"""Called with the bytes at hand and the bytes in all, where the server says how many."""

TIMEOUT = 10.0
"""Seconds until a silent connection is given up."""
MEASURING = 5.0
"""Seconds, at most, for which the rate is measured before it is judged."""
SOON = 300.0
"""Seconds for the rest of the file beyond which another address is tried."""
CHUNK = 2**18
"""Bytes asked of the connection at once."""


class TooSlow(DataError):
    """The file would not arrive in time."""


class _Clock:
    """How long the whole download has taken, and whether it can end in time."""

    def __init__(self, seconds: float | None) -> None:
        self.allowed = math.inf if seconds is None else seconds
        self.start = time.monotonic()

    def timeout(self) -> float:
        """Seconds that a connection may be silent."""
        self.check()
        return min(TIMEOUT, max(self.left(), 0.1))

    def left(self) -> float:
        return self.start + self.allowed - time.monotonic()

    def check(self) -> None:
        """Raises TooSlow if nothing is left."""
        if self.left() < 0:
            raise self.too_slow()

    def too_slow(self) -> TooSlow:
        return TooSlow(
            f"the download would take longer than {self.allowed:g} s; run again to resume it, or use --dataset "
            "synthetic."
        )


class _Slow(Exception):
    """One address serves too slowly, at `rate` bytes per second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


def download(
    addresses: Sequence[str],
    target: Path,
    md5: str,
    *,
    progress: Progress | None = None,
    deadline_seconds: float | None = None,
) -> None:
    """Fetches `target` from the first of `addresses` that serves it whole; returns at once where it exists.

    An address at which the rest would take longer than five minutes, or than the deadline allows, is left for the next
    one; if none is better, and there is time, for the fastest of them.

    Bytes are gathered in ``target.part``, which outlives a broken connection, Ctrl-C and a killed process: the next
    address, or the next run, asks only for the rest. `target` appears by one rename, once the md5 of the whole is
    right. Processes that want the same target take turns, by a lock on ``target.lock``, and find it there when their
    turn comes.

    Args:
        addresses: http or https, in order of preference.
        target: the file to make; its folder is made too.
        md5: of the whole file, in hexadecimal.
        progress: called after every chunk with (bytes at hand, bytes in all or None).
        deadline_seconds: the whole download must end within so many seconds; judged once a rate was measured for at
        most 5 s.

    Raises:
        TooSlow: it would take longer than `deadline_seconds` from every address; the part is kept.
        DataError: no address served the file, or the folder cannot be written.
    """
    clock = _Clock(deadline_seconds)
    part = target.with_name(f"{target.name}.part")
    with _turn(target, clock):
        if target.exists():
            return
        if not _is_whole(part, md5):
            _fetch_from_any(addresses, part, md5, clock, progress or _silent)
        os.replace(part, target)


def _silent(received: int, total: int | None) -> None:
    """Shows no progress."""


def _fetch_from_any(addresses: Sequence[str], part: Path, md5: str, clock: _Clock, progress: Progress) -> None:
    failures: list[str] = []
    slow: dict[str, float] = {}
    for address, patience in _attempts(addresses, slow, clock):
        try:
            if _fetch_whole(address, part, md5, clock, patience, progress):
                return
            failures.append(f"{address}: served a damaged file")
        except _Slow as found:
            slow[address] = found.rate
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{address}: {_reason(error)}")
    if slow:
        raise clock.too_slow()
    clock.check()
    reasons = ", ".join(failures) or "no address is known"
    raise DataError(
        f"could not fetch {part.stem} ({reasons}); put the file into {part.parent}, or use --dataset synthetic."
    )


def _attempts(addresses: Sequence[str], slow: dict[str, float], clock: _Clock) -> Iterator[tuple[str, float]]:
    """Each address and the seconds that the rest may take from it; then, without that limit, those found `slow`, the
    fastest first.
    """
    for number, address in enumerate(addresses, start=1):
        yield address, math.inf if number == len(addresses) and not slow else SOON
    if clock.left() > SOON:
        for address in sorted(slow, key=slow.__getitem__, reverse=True):
            del slow[address]
            yield address, math.inf


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner) or type(error).__name__


@contextmanager
def _turn(target: Path, clock: _Clock) -> Iterator[None]:
    """Waits until no other process fetches `target`."""
    lock = target.with_name(f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, clock)
    except OSError as error:
        raise DataError(
            f"cannot write into {target.parent} ({error.strerror}); make it writable, or name another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; it stays, empty and unlocked
            lock.unlink()
        handle.close()


def _acquire(lock: Path, clock: _Clock) -> BinaryIO:
    """The lock's open file. The system drops the lock when its process ends, however it ends."""
    while True:
        handle = lock.open("ab")
        with suppress(FileNotFoundError):
            # Who held it before may have removed the file that was opened here: then the lock on it excludes nobody.
            if _locked(handle) and os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                return handle
        handle.close()
        clock.check()
        time.sleep(0.1)


def _locked(handle: BinaryIO) -> bool:
    """Tries to lock the file; true also where the file system has no locks, as some network ones."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _fetch_whole(address: str, part: Path, md5: str, clock: _Clock, patience: float, progress: Progress) -> bool:
    """Completes the part from `address` and says whether it is now right; if not, it is gone."""
    resumed = part.exists()
    _fetch(address, part, clock, patience, progress)
    if _is_whole(part, md5):
        return True
    part.unlink(missing_ok=True)
    # The fault may lie in the bytes that were there before, so the same address has one more chance from the start.
    return resumed and _fetch_whole(address, part, md5, clock, patience, progress)


def _fetch(address: str, part: Path, clock: _Clock, patience: float, progress: Progress) -> None:
    """Appends to the part what it lacks, as far as the server has it."""
    have = part.stat().st_size if part.exists() else 0
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError("not an http or https address")
    request = urllib.request.Request(
        address, headers={"User-Agent": "fastcifar"} | ({"Range": f"bytes={have}-"} if have else {})
    )
    try:
        response = urllib.request.urlopen(request, timeout=clock.timeout())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return
        raise
    with response, part.open("ab") as file:
        start, total = _extent(response)
        if start > have:
            raise ConnectionError(f"sent bytes from {start} on, asked for {have}")
        file.truncate(start)
        _copy(response, file, start, total, clock, patience, progress)


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The offset of the response's first byte in the file, and the file's size where the server says."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not match:
            raise ConnectionError("sent a part of the file without saying which")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    return 0, response.length


def _copy(
    response: http.client.HTTPResponse,
    file: BinaryIO,
    start: int,
    total: int | None,
    clock: _Clock,
    patience: float,
    progress: Progress,
) -> None:
    """Appends the response to `file`. Raises _Slow where the rest would take longer than `patience` or the deadline
    allows.
    """
    received, began = start, time.monotonic()
    measuring = min(MEASURING, clock.left() / 4)
    while chunk := response.read1(CHUNK):
        file.write(chunk)
        received += len(chunk)
        progress(received, total)
        clock.check()
        elapsed = time.monotonic() - began
        rate = (received - start) / elapsed if elapsed > measuring else math.inf
        if total and total - received > rate * min(patience, clock.left()):
            raise _Slow(rate)
    if total and received < total:
        raise ConnectionError(f"the connection broke off after {received} of {total} bytes")


def _is_whole(part: Path, md5: str) -> bool:
    if not part.exists():
        return False
    with part.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
