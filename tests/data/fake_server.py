"""An HTTP server that misbehaves on request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from socketserver import StreamRequestHandler


@dataclass
class Server:
    """Serves `content` at ``address(habit)``, and remembers the habits asked for."""

    port: int
    content: bytes = b""
    asked: list[str] = field(default_factory=list)

    def address(self, habit: str) -> str:
        return f"http://127.0.0.1:{self.port}/{habit}/file.bin"


OK = b"HTTP/1.1 200 OK\r\n"


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: "


def at_once(content: bytes, asked: int) -> dict[str, bytes]:
    """What the server sends at once, by habit."""
    length, half = b"Content-Length: %d\r\n\r\n" % len(content), content[: len(content) // 2]
    return {
        "good": OK + length + content,
        "no_length": OK + b"\r\n" + content,
        "chunked": CHUNKED + b"%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n",
        "absent": b"HTTP/1.1 404 Not Found\r\n\r\n",
        "corrupt": OK + length + bytes(255 - byte for byte in content),
        "truncating": OK + length + half,
        "page": OK + b"\r\n<html>" + bytes(len(content)),
        "empty": OK + b"Content-Length: 0\r\n\r\n",
        "stays_open": OK + b"\r\n" + content,
        "silent": OK + length + half,
        "dumb": b"",
        "redirecting": MOVED + b"/redirecting/file.bin\r\n\r\n",
        "redirecting_on": MOVED + b"/redirecting_on/%d\r\n\r\n" % asked,
        "redirecting_to_a_file": MOVED + b"file:///etc/passwd\r\n\r\n",
        "redirecting_to_garbage": MOVED + b"http://[\x1b[31m\xff\r\n\r\n",
        "garbage": b"\x1b[31m\x00\xff\x0b garbage\r\n" * 20,
        "long_line": b"HTTP/1.1 200 " + b"x" * 100_000,
        "many_headers": OK + b"".join(b"X-%d: x\r\n" % number for number in range(1000)),
        "garbled_length": OK + b"Content-Length: many\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        "huge_chunk": CHUNKED + b"fffffffffffffff\r\n" + half,
    }


WITHOUT_END = {
    "slow_header": (OK + b"X: ", b"x"),
    "slow_chunk": (CHUNKED, b"0"),
    "continuing": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
"""How some answers begin, and what then comes every 20 ms."""


def answer(habit: str, content: bytes, asked: int) -> Iterator[bytes | float]:
    """Yields what the server sends, and for how many seconds it then waits."""
    match habit:
        case "endless":
            yield OK + b"\r\n"
            while True:
                yield content
        case "slow" | "slow_without_length":  # 100 kB/s
            yield OK + (b"Content-Length: %d\r\n\r\n" % len(content) if habit == "slow" else b"\r\n")
            for offset in range(0, len(content), 1000):
                yield content[offset : offset + 1000]
                yield 0.01
        case "slow_header" | "slow_chunk" | "continuing":
            start, step = WITHOUT_END[habit]
            yield start
            while True:
                yield step
                yield 0.02
        case _:
            yield at_once(content, asked)[habit]
            if habit in ("stays_open", "silent", "dumb"):
                yield 3.0


class Habits(StreamRequestHandler):
    """Answers by the habit that an address names."""

    def handle(self) -> None:
        served: Server = self.server.served
        habit = self.rfile.readline().split(b"/")[1].decode()
        while self.rfile.readline().strip():
            pass
        served.asked.append(habit)
        with suppress(OSError):
            for part in answer(habit, served.content, len(served.asked)):
                if isinstance(part, float):
                    time.sleep(part)
                else:
                    self.wfile.write(part)
