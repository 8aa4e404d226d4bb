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


def answer(habit: str, content: bytes, asked: int) -> Iterator[bytes | float]:
    """Yields what the server sends, and for how many seconds it then waits."""
    length, half = b"Content-Length: %d\r\n\r\n" % len(content), content[: len(content) // 2]
    match habit:
        case "good":
            yield OK + length + content
        case "no_length":
            yield OK + b"\r\n" + content
        case "chunked":
            yield OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n"
        case "absent":
            yield b"HTTP/1.1 404 Not Found\r\n\r\n"
        case "corrupt":
            yield OK + length + bytes(255 - byte for byte in content)
        case "truncating":
            yield OK + length + half
        case "page":
            yield OK + b"\r\n<html>" + bytes(len(content))
        case "empty":
            yield OK + b"Content-Length: 0\r\n\r\n"
        case "endless":
            yield OK + b"\r\n"
            while True:
                yield content
        case "stays_open":
            yield OK + b"\r\n" + content
            yield 3.0
        case "silent":
            yield OK + length + half
            yield 3.0
        case "dumb":
            yield 3.0
        case "slow" | "slow_without_length":  # 100 kB/s
            yield OK + (length if habit == "slow" else b"\r\n")
            for offset in range(0, len(content), 1000):
                yield content[offset : offset + 1000]
                yield 0.01
        case "slow_header" | "slow_chunk" | "continuing":
            start, step = {
                "slow_header": (OK + b"X: ", b"x"),
                "slow_chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
                "continuing": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            }[habit]
            yield start
            while True:
                yield step
                yield 0.02
        case "redirecting":
            yield b"HTTP/1.1 302 Found\r\nLocation: /redirecting/file.bin\r\n\r\n"
        case "redirecting_on":
            yield b"HTTP/1.1 302 Found\r\nLocation: /redirecting_on/%d\r\n\r\n" % asked
        case "redirecting_to_a_file":
            yield b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"
        case "redirecting_to_garbage":
            yield b"HTTP/1.1 302 Found\r\nLocation: http://[\x1b[31m\xff\r\n\r\n"
        case "garbage":
            yield b"\x1b[31m\x00\xff\x0b garbage\r\n" * 20
        case "long_line":
            yield b"HTTP/1.1 200 " + b"x" * 100_000
        case "many_headers":
            yield OK + b"".join(b"X-%d: x\r\n" % number for number in range(1000))
        case "garbled_length":
            yield OK + b"Content-Length: many\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"
        case "huge_chunk":
            yield OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n" + half
        case _:
            raise AssertionError(habit)


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
