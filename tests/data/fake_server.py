"""An HTTP server that misbehaves on request."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


@dataclass
class Server:
    """Serves `content` at ``address(habit)``, and remembers the habits asked for."""

    port: int
    content: bytes = b""
    asked: list[str] = field(default_factory=list)

    def address(self, habit: str, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{habit}/{name}"


class Habits(BaseHTTPRequestHandler):
    """Answers by the habit that an address names.

    Habits: good, no_length, corrupt, endless, truncating, silent (stalls half-way), slow (100 kB/s), trickling, absent.
    """

    def do_GET(self) -> None:
        served: Server = self.server.served
        habit, content = self.path.split("/")[1], served.content
        served.asked.append(habit)
        if habit == "absent":
            return self.send_error(404)
        self.send_response(200)
        if habit not in ("no_length", "endless"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            self.send_body(habit, content)

    def send_body(self, habit: str, content: bytes) -> None:
        if habit == "corrupt":
            content = bytes(255 - byte for byte in content)
        if habit in ("truncating", "silent"):
            content = content[: len(content) // 2]
        step, pause = {"slow": (1000, 0.01), "trickling": (1, 0.05)}.get(habit, (len(content), 0.0))
        for offset in range(0, len(content), step):
            self.wfile.write(content[offset : offset + step])
            time.sleep(pause)
        while habit == "endless":
            self.wfile.write(content)
        if habit == "silent":
            time.sleep(3.0)

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""
