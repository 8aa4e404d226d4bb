from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest
from fake_cifar import UNREACHABLE, md5
from fake_server import Server
from filelock import FileLock
from rich.progress import Progress

from fastcifar.data import download as module
from fastcifar.data.download import attempts, download
from fastcifar.errors import DataError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made" / "file.bin"


@pytest.fixture
def impatient(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows a third of a second for a small file instead of five minutes, then three, and a tenth to measure."""
    server.content = server.content[:60_000]
    for name, seconds in {"PATIENCE": 0.3, "LAST_PATIENCE": 3.0, "WINDOW": 0.1}.items():
        monkeypatch.setattr(module, name, seconds)


def get(server: Server, target: Path, *habits: str, deadline_seconds: float = float("inf")) -> None:
    addresses = [server.address(habit) if habit.isidentifier() else habit for habit in habits]
    download(addresses, target, md5(server.content), len(server.content), deadline_seconds)


def left(target: Path) -> list[str]:
    """Returns the names of the files that remain, but for the lock."""
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("habit", ["good", "no_length", "chunked", "stays_open", "endless"])
def test_fetches_as_many_bytes_as_the_file_has(server: Server, target: Path, habit: str) -> None:
    began = time.monotonic()
    get(server, target, habit)
    assert target.read_bytes() == server.content
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert left(target) == ["file.bin"]
    assert server.asked == [habit]
    assert time.monotonic() - began < 2


def test_an_existing_target_is_left_alone(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    get(server, target, "good")
    assert (target.read_bytes(), server.asked) == (b"mine", [])


OTHER_MD5 = r"MD5 hash .* does not match the known hash: expected md5:\w+ but got \w+"
LOOP = "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop"
BAD = {
    "absent": "HTTP Error 404: Not Found",
    "corrupt": OTHER_MD5,
    "page": OTHER_MD5,
    "empty": "the connection broke off after 0 of 400000 bytes",
    "truncating": "the connection broke off after 200000 of 400000 bytes",
    "garbage": ".*",
    "garbled_length": ".*",
    "huge_chunk": ".*",
    "long_line": "got more than 65536 bytes when reading status line",
    "many_headers": "got more than 100 headers",
    "redirecting": LOOP,
    "redirecting_on": LOOP,
    "redirecting_to_a_file": "HTTP Error 302: Found - Redirection to url 'file:///etc/passwd' is not allowed",
    "redirecting_to_garbage": ".*",
    UNREACHABLE: "Connection refused",
    "not an address": "unknown url type: 'not an address'",
    "http://[bad": "Invalid IPv6 URL",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_address_gives_way_or_is_told_in_one_line(server: Server, target: Path, bad: str) -> None:
    began = time.monotonic()
    advice = f"; put the file into {target.parent}, or use --dataset synthetic"
    with pytest.raises(
        DataError, match=rf"^could not fetch file\.bin \([^()]*(\([^()]*\))?{BAD[bad]}\){advice}\.$"
    ) as caught:
        get(server, target, bad)
    assert str(caught.value).isprintable()
    assert left(target) == []
    get(server, target, bad, "good")
    assert target.read_bytes() == server.content
    assert left(target) == ["file.bin"]
    assert time.monotonic() - began < 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "habit", ["dumb", "silent", "slow", "slow_without_length", "slow_header", "slow_chunk", "continuing"]
)
def test_a_server_cannot_hold_up_the_download(server: Server, target: Path, habit: str) -> None:
    began = time.monotonic()
    get(server, target, habit, "good")
    assert target.read_bytes() == server.content
    assert server.asked == [habit, "good"]
    assert left(target) == ["file.bin"]
    assert time.monotonic() - began < 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("habits", "asked"), [("slow absent", "slow absent slow"), ("absent slow", "absent slow")])
def test_a_slow_address_is_the_last_resort(server: Server, target: Path, habits: str, asked: str) -> None:
    get(server, target, *habits.split())
    assert target.read_bytes() == server.content
    assert server.asked == asked.split()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("habit", ["dumb", "slow_header", "slow_chunk", "continuing"])
def test_the_last_resort_has_an_end(server: Server, target: Path, habit: str) -> None:
    with pytest.raises(DataError, match=r"^could not fetch file\.bin \(http.*: too slow, 0 kB/s\); put the file into"):
        get(server, target, habit)


def test_the_fastest_of_slow_addresses_is_gone_back_to() -> None:
    slow, rates, asked = {}, {"a": 10.0, "b": 30.0, "c": 20.0}, []
    for address, seconds in attempts(list(rates), slow, float("inf")):
        asked.append((address, seconds))
        slow[address] = rates[address]
    most = [module.PATIENCE] * 3 + [module.LAST_PATIENCE] * 3
    assert asked == list(zip("abcbca", most, strict=True))
    slow = {"a": 10.0}
    assert [address for address, _ in attempts(["a"], slow, time.monotonic() + 60)] == ["a"]


@pytest.mark.parametrize("habits", [["slow"], ["slow", "absent", "slow"], ["silent"]])
def test_too_slow_is_told_early(server: Server, target: Path, habits: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"too slow, \d+ kB/s\); put the file into .*, or use --dataset synthetic\.$"):
        get(server, target, *habits, deadline_seconds=1)
    assert time.monotonic() - began < 2
    assert server.asked == habits
    assert left(target) == []


def test_a_slow_address_gives_way_within_the_deadline(server: Server, target: Path) -> None:
    get(server, target, "slow", "good", deadline_seconds=2)
    assert target.read_bytes() == server.content


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write into .*; make it writable, or name another folder"):
        get(server, tmp_path / "file" / "file.bin", "good")


def test_interrupting_leaves_nothing(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, completed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(server, target, "good")
    assert left(target) == []


def test_what_a_killed_process_left_is_swept_away(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (child := os.fork()) == 0:
        monkeypatch.setattr(Progress, "update", lambda *_, **__: os._exit(9))
        try:
            get(server, target, "silent")
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert left(target) == [".file.bin.partial"]
    get(server, target, "good")
    assert left(target) == ["file.bin"]


def test_processes_take_turns(server: Server, target: Path) -> None:
    server.content = server.content[:30_000]
    threads = [threading.Thread(target=get, args=(server, target, "slow")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == server.content
    assert server.asked == ["slow"]


def test_waiting_for_another_process_ends_with_the_deadline(server: Server, target: Path) -> None:
    target.parent.mkdir()
    with (
        FileLock(target.with_name(".file.bin.lock")),
        pytest.raises(DataError, match=r"another process has been fetching it for 0\.2 s\)"),
    ):
        get(server, target, "good", deadline_seconds=0.2)
    get(server, target, "good")


def test_a_bar_in_a_terminal(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    get(server, target, "good")
    captured = capsys.readouterr()
    assert "kB" in captured.err
    assert captured.out == ""
