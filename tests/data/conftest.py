"""An environment that reaches neither network nor cache, a tiny data set, and a server for it."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socketserver import ThreadingTCPServer

import numpy as np
import pytest
from fake_cifar import Tiny, form_of, md5
from fake_server import Habits, Server

GIVEN = os.environ.get("FASTCIFAR_DATA", "")


@pytest.fixture
def real_cifar() -> Path:
    """Returns the folder given in FASTCIFAR_DATA; for tests marked `data`."""
    return Path(GIVEN)


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sets up an empty cache without settings or proxies; returns the cache's folder."""
    for name in ("FASTCIFAR_DATA", "FASTCIFAR_MIRRORS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastcifar"


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
    packed = plain.packed()
    return replace(plain, form=replace(plain.form, archive_md5=md5(packed), archive_size=len(packed)))


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingTCPServer(("127.0.0.1", 0), Habits) as http:
        http.daemon_threads, http.block_on_close = True, False
        http.served = Server(http.server_address[1], np.random.default_rng(1).bytes(400_000))
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield http.served
        http.shutdown()
        thread.join()
