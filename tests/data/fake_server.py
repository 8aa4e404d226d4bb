"""An HTTP server with bad habits."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


@dataclass
class Server:
    """Serves `content` at ``address(habit)``, and remembers the Range of each request, None where there was none."""

    port: int
    content: bytes = b""
    ranges: list[tuple[str, str | None]] = field(default_factory=list)

    def address(self, habit: str, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{habit}/{name}"


class Habits(BaseHTTPRequestHandler):
    """Habits: good, no_range (ignores Range), no_length, corrupt, truncating, silent (stalls half-way), slow,
    other_range, absent.
    """

    def do_GET(self) -> None:
        served: Server = self.server.served
        habit, asked, content = self.path.split("/")[1], self.headers.get("Range"), served.content
        served.ranges.append((habit, asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and habit not in ("no_range", "no_length") else 0
        if habit == "absent":
            return self.send_error(404)
        if start and start >= len(content):
            return self.send_error(416)
        if habit == "corrupt":
            content = bytes(255 - byte for byte in content)
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start + 10 * (habit == 'other_range')}-{len(content) - 1}/{len(content)}"
            )
        if habit != "no_length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.send_body(habit, content, start)

    def send_body(self, habit: str, content: bytes, start: int) -> None:
        half = len(content) // 2
        if habit in ("truncating", "silent"):
            self.wfile.write(content[start:half])
            if habit == "silent":
                self.wfile.flush()
                time.sleep(3.0)
        elif habit == "slow":
            try:
                for offset in range(start, len(content), 1000):
                    self.wfile.write(content[offset : offset + 1000])
                    time.sleep(0.01)
            except OSError:
                return
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""
