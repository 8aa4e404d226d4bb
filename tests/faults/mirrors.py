"""Serves a file badly in every way: another mirror takes over, or one sentence says why there is no file."""

from __future__ import annotations

import gzip
import hashlib
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from fastcifar.data import download as module

from .harness import Attack, Trial, in_child

CONTENT = bytes(range(256)) * 400
OK, SIZE = b"HTTP/1.1 200 OK\r\n", len(CONTENT)
WHOLE = OK + b"Content-Length: %d\r\n\r\n" % SIZE
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DEADLINE, SECONDS = 3.0, 8.0
"""The time allowed for a download, and in which it must have come to an end, in seconds."""


def moved(target: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % target


ANSWERS: dict[str, bytes] = {
    "absent": b"HTTP/1.1 404 Not Found\r\n\r\n",
    "a server's error": b"HTTP/1.1 500 \x1b[2J\x07\r\n\r\n",
    "nothing": b"",
    "no HTTP": b"\x00\xff\x1b[31m" * 50,
    "half a status line": b"HTTP/1.1 2",
    "an odd status": b"HTTP/1.1 99999999999999999999 OK\r\n\r\n",
    "a long status line": b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n",
    "many headers": OK + b"X: y\r\n" * 1000 + b"\r\n",
    "one long header": OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    "other bytes": WHOLE + CONTENT[::-1],
    "a page": OK + b"Content-Length: 6\r\n\r\n<html>",
    "half of it": WHOLE + CONTENT[: SIZE // 2],
    "half of it, and no length": OK + b"\r\n" + CONTENT[: SIZE // 2],
    "a byte too many": WHOLE.replace(b"%d" % SIZE, b"%d" % (SIZE + 1)) + CONTENT + b"x",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n" + CONTENT[::-1],
    "a length of no number": OK + b"Content-Length: many\r\n\r\n" + CONTENT[::-1],
    "a huge length": OK + b"Content-Length: 99999999999999999\r\n\r\n" + CONTENT[::-1],
    "it compressed": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(CONTENT),
    "a chunk of no size": CHUNKED + b"zz\r\n" + CONTENT,
    "a chunk of negative size": CHUNKED + b"-5\r\n" + CONTENT,
    "a chunk cut short": CHUNKED + b"fffff\r\n" + CONTENT,
    "the way to itself": moved(b"/"),
    "the way to a file": moved(b"file:///etc/passwd"),
    "the way to nowhere": moved(b"http://[bad/\x1b[2J"),
}
"""What mirrors answer at once, before they close the connection."""
ENDLESS: dict[str, tuple[bytes, bytes, float]] = {
    "bytes without end": (OK + b"\r\n", CONTENT, 0.0),
    "headers without end": (OK, b"X: y\r\n", 0.05),
    "drops": (WHOLE, b"x", 0.05),
    "drops, and no length": (OK + b"\r\n", b"x", 0.05),
    "its status in drops": (b"HTTP", b"x", 0.05),
    "silence": (b"", b"", 0.5),
    "silence half-way": (WHOLE + CONTENT[: SIZE // 2], b"", 0.5),
    "the way on without end": (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
}
"""What mirrors begin with, what they go on with for ever, and the seconds between."""


def answer(connection: socket.socket, habit: str) -> None:
    beginning, again, pause = ENDLESS.get(habit, (ANSWERS.get(habit, WHOLE + CONTENT), None, 0.0))
    with connection, suppress(OSError):
        connection.recv(65536)
        connection.sendall(beginning)
        while again is not None:
            connection.sendall(again)
            time.sleep(pause)


def address(habit: str) -> str:
    """The address of a server of this process; one whose habit has no entry is good."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            threading.Thread(target=answer, args=(server.accept()[0], habit), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/"


def trial(habits: list[str], folder: Path) -> str | None:
    target = folder / "file.bin"

    def act() -> None:
        module.PATIENCE, module.LAST_PATIENCE, module.WINDOW = 0.3, 0.3, 0.1
        addresses, md5 = [address(habit) for habit in habits], hashlib.md5(CONTENT).hexdigest()
        module.download(addresses, target, md5, SIZE, DEADLINE)

    ended = in_child(act, SECONDS)
    left = [path.name for path in folder.iterdir() if path.suffix != ".lock" and path != target]
    arrived = target.exists() and target.read_bytes() == CONTENT
    if not ended.fault and (left or target.exists() != arrived or ("good" in habits and not arrived)):
        return f"{'leaves ' + str(left) if left else 'keeps a wrong file' if target.exists() else 'has no file'}"
    return ended.fault


def mirrors(place: Path) -> dict[str, Trial]:
    alone = {f"a mirror that sends {habit}": partial(trial, [habit]) for habit in (*ANSWERS, *ENDLESS)}
    return alone | {f"{name}, then a good one": partial(trial, [*one.args[0], "good"]) for name, one in alone.items()}


ATTACKS = (Attack("hostile mirrors", mirrors, short=6, middle=64),)
