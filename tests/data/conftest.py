"""A tiny data set of CIFAR's form, an HTTP server with bad habits, and an environment that reaches neither network nor cache."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data.cifar import CIFAR10, BatchFile, CifarFormat

UNREACHABLE = "http://127.0.0.1:9/"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, no settings, no proxies; returns the cache's folder."""
    for name in ("FASTCIFAR_DATA", "FASTCIFAR_MIRRORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastcifar"


@dataclass
class Tiny:
    """A data set of CIFAR-10's form with two train batches of 20 images, a test batch of 10, and three classes."""

    form: CifarFormat
    files: dict[str, bytes]
    images: np.ndarray
    """uint8 (40, 32, 32, 3): the train split."""
    labels: list[int]

    def folder(self, place: Path) -> Path:
        """The unpacked folder, made in `place`."""
        folder = place / self.form.folder
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def archive(self, place: Path) -> Path:
        """The archive, made in `place`."""
        place.mkdir(parents=True, exist_ok=True)
        (place / self.form.archive).write_bytes(self.packed())
        return place / self.form.archive

    def packed(self) -> bytes:
        return pack({f"{self.form.folder}/{name}": content for name, content in self.files.items()})


def pack(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A .tar.gz of files by name, or of ready-made headers without contents."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return packed.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def form_of(files: dict[str, bytes]) -> CifarFormat:
    """CIFAR-10's form with the md5s of these files: batches.meta, data_batch_1, data_batch_2, test_batch."""
    batch = {name: BatchFile(name, md5(content)) for name, content in files.items()}
    train = (batch["data_batch_1"], batch["data_batch_2"])
    return replace(CIFAR10, train=train, test=(batch["test_batch"],), meta=batch["batches.meta"], address=UNREACHABLE)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 3, 50).tolist()
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(50, 3072))
    files = {"batches.meta": pickle.dumps({b"label_names": [b"ant", b"bee", b"cow"]}, protocol=4)}
    for name, part in (("data_batch_1", slice(0, 20)), ("data_batch_2", slice(20, 40)), ("test_batch", slice(40, 50))):
        files[name] = pickle.dumps({b"data": rows[part], b"labels": labels[part]}, protocol=4)
    plain = Tiny(form_of(files), files, images[:40], labels[:40])
    return replace(plain, form=replace(plain.form, archive_md5=md5(plain.packed())))


@dataclass
class Server:
    """Serves `content` at ``address(habit)``, and remembers the Range of each request, None where there was none."""

    port: int
    content: bytes = b""
    ranges: list[tuple[str, str | None]] = field(default_factory=list)

    def address(self, habit: str, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{habit}/{name}"


class _Habits(BaseHTTPRequestHandler):
    """Habits: good, no_range (ignores Range), no_length, corrupt, truncating, silent (stalls half-way), slow, other_range, absent."""

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
            self.send_header("Content-Range", f"bytes {start + 10 * (habit == 'other_range')}-{len(content) - 1}/{len(content)}")
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
                time.sleep(1.0)
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


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Habits) as http:
        http.daemon_threads, http.block_on_close = True, False
        http.served = Server(http.server_port, np.random.default_rng(1).bytes(400_000))
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield http.served
        http.shutdown()
        thread.join()
