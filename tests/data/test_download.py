from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_cifar import UNREACHABLE, md5
from fake_server import Server

from fastcifar.data import download as module
from fastcifar.data.download import TooSlow, download
from fastcifar.errors import DataError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made" / "file.bin"


def left(target: Path) -> list[str]:
    """Names of the files that remain."""
    return sorted(path.name for path in target.parent.iterdir())


def part_of(target: Path, content: bytes) -> Path:
    target.parent.mkdir(exist_ok=True)
    part = target.with_name("file.bin.part")
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("habit", ["good", "no_range", "no_length"])
def test_fetches(server: Server, target: Path, habit: str) -> None:
    seen = []
    download([server.address(habit)], target, md5(server.content), progress=lambda *state: seen.append(state))
    assert target.read_bytes() == server.content
    assert left(target) == ["file.bin"]
    total = None if habit == "no_length" else len(server.content)
    assert seen[-1] == (len(server.content), total)
    assert seen == sorted(seen)
    assert server.ranges == [(habit, None)]


@pytest.mark.parametrize("habit", ["good", "no_range", "no_length"])
def test_resumes_where_the_server_can(server: Server, target: Path, habit: str) -> None:
    part_of(target, server.content[:1000])
    seen = []
    download([server.address(habit)], target, md5(server.content), progress=lambda *state: seen.append(state))
    assert target.read_bytes() == server.content
    assert server.ranges == [(habit, "bytes=1000-")]
    assert seen[-1][0] == len(server.content)


def test_an_existing_target_is_left_alone(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    download([server.address("good")], target, md5(server.content))
    assert (target.read_bytes(), server.ranges) == (b"mine", [])


def test_a_complete_part_needs_no_server(server: Server, target: Path) -> None:
    part_of(target, server.content)
    download([], target, md5(server.content))
    assert target.read_bytes() == server.content


@pytest.mark.parametrize("extra", [b"", b"more"], ids=["as long", "longer"])
def test_a_wrong_part_of_full_length_starts_over(server: Server, target: Path, extra: bytes) -> None:
    part_of(target, bytes(len(server.content)) + extra)
    download([server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert [asked is None for _, asked in server.ranges] == [False, True]


def test_a_part_with_a_wrong_beginning_starts_over(server: Server, target: Path) -> None:
    part_of(target, b"wrong")
    download([server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert server.ranges == [("good", "bytes=5-"), ("good", None)]


@pytest.mark.parametrize(
    "bad", ["absent", "corrupt", "truncating", "unreachable", "not an address", "malformed", "other scheme"]
)
def test_the_next_address_is_tried(server: Server, target: Path, bad: str) -> None:
    other = {
        "unreachable": UNREACHABLE,
        "not an address": "nonsense",
        "malformed": "http://[bad",
        "other scheme": Path(__file__).as_uri(),
    }
    download([other.get(bad) or server.address(bad), server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert left(target) == ["file.bin"]
    half = f"bytes={len(server.content) // 2}-" if bad == "truncating" else None
    assert server.ranges[-1] == ("good", half)


def test_a_silent_connection_is_given_up(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    began = time.monotonic()
    download([server.address("silent"), server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert time.monotonic() - began < 2.5
    assert server.ranges[-1] == ("good", f"bytes={len(server.content) // 2}-")


def test_a_broken_connection_keeps_the_part(server: Server, target: Path) -> None:
    with pytest.raises(
        DataError, match=r"/truncating/file\.bin: the connection broke off after 200000 of 400000 bytes"
    ):
        download([server.address("truncating")], target, md5(server.content))
    assert left(target) == ["file.bin.part"]
    assert (target.parent / "file.bin.part").read_bytes() == server.content[:200_000]
    download([server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert server.ranges == [("truncating", None), ("good", "bytes=200000-")]


def test_another_range_than_asked_is_refused(server: Server, target: Path) -> None:
    part = part_of(target, server.content[:1000])
    with pytest.raises(DataError, match="sent bytes from 1010 on, asked for 1000"):
        download([server.address("other_range")], target, md5(server.content))
    assert part.read_bytes() == server.content[:1000]


def test_a_corrupt_file_leaves_nothing(server: Server, target: Path) -> None:
    with pytest.raises(DataError, match="served a damaged file"):
        download([server.address("corrupt")], target, md5(server.content))
    assert left(target) == []


def test_failure_says_what_to_do(server: Server, target: Path) -> None:
    with pytest.raises(DataError) as caught:
        download([server.address("absent"), UNREACHABLE], target, md5(server.content))
    message = str(caught.value)
    assert f"({server.address('absent')}: Not Found, {UNREACHABLE}: Connection refused)" in message
    assert message.endswith(f"; put the file into {target.parent}, or use --dataset synthetic.")
    assert "\n" not in message


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write into .*; make it writable, or name another folder"):
        download([server.address("good")], tmp_path / "file" / "file.bin", md5(server.content))


def test_interrupting_keeps_the_part(server: Server, target: Path) -> None:
    def interrupt(received: int, total: int | None) -> None:
        if received > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download([server.address("slow")], target, md5(server.content), progress=interrupt)
    assert left(target) == ["file.bin.part"]
    kept = (target.parent / "file.bin.part").read_bytes()
    assert len(kept) > 100_000
    assert server.content.startswith(kept)


def test_too_slow_is_told_early_and_keeps_the_part(server: Server, target: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TooSlow, match=r"longer than 2 s; run again to resume it, or use --dataset synthetic\.$"):
        download([server.address("slow")], target, md5(server.content), deadline_seconds=2)
    assert time.monotonic() - began < 1.5
    assert left(target) == ["file.bin.part"]
    download([server.address("good")], target, md5(server.content), deadline_seconds=20)
    assert target.read_bytes() == server.content
    assert server.ranges[-1][1] is not None


def test_a_slow_address_gives_way_within_the_deadline(server: Server, target: Path) -> None:
    began = time.monotonic()
    download([server.address("slow"), server.address("good")], target, md5(server.content), deadline_seconds=2)
    assert target.read_bytes() == server.content
    assert time.monotonic() - began < 2
    (_, first), (habit, resumed) = server.ranges
    assert (first, habit) == (None, "good")
    assert resumed is not None


def test_too_slow_is_told_once_no_address_is_left(server: Server, target: Path) -> None:
    addresses = [server.address(habit) for habit in ("slow", "absent", "slow")]
    with pytest.raises(TooSlow, match="longer than 2 s"):
        download(addresses, target, md5(server.content), deadline_seconds=2)
    assert [habit for habit, _ in server.ranges] == ["slow", "absent", "slow"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for the rest of a file, in place of five minutes, and a tenth to measure."""
    monkeypatch.setattr(module, "SOON", 0.5)
    monkeypatch.setattr(module, "MEASURING", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_slow_address_gives_way_without_a_deadline(server: Server, target: Path) -> None:
    began = time.monotonic()
    download([server.address("slow"), server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert time.monotonic() - began < 2
    assert [habit for habit, _ in server.ranges] == ["slow", "good"]
    assert server.ranges[-1][1] is not None


@pytest.mark.usefixtures("impatient")
def test_a_slow_address_is_the_last_resort(server: Server, target: Path) -> None:
    server.content = server.content[:150_000]
    download([server.address("slow"), server.address("absent")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert [habit for habit, _ in server.ranges] == ["slow", "absent", "slow"]
    assert server.ranges[-1][1] is not None


@pytest.mark.usefixtures("impatient")
def test_the_only_address_may_be_slow(server: Server, target: Path) -> None:
    server.content = server.content[:150_000]
    download([server.address("absent"), server.address("slow")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert [habit for habit, _ in server.ranges] == ["absent", "slow"]


def test_the_fastest_of_slow_addresses_is_gone_back_to(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, asked = {"a": 10.0, "b": 30.0, "c": 20.0}, []

    def fetch(address: str, part: Path, md5: str, clock: object, patience: float, progress: object) -> bool:
        asked.append(address)
        if patience < float("inf"):
            raise module._Slow(rates[address])
        if address == "b":
            raise ConnectionError("it broke off")
        part.touch()
        return True

    monkeypatch.setattr(module, "_fetch_whole", fetch)
    download(list(rates), target, "")
    assert asked == ["a", "b", "c", "b", "c"]


def test_the_rate_counts_what_came_over_this_connection(server: Server, target: Path) -> None:
    part_of(target, server.content[:-20_000])
    download([server.address("slow")], target, md5(server.content), deadline_seconds=8)
    assert target.read_bytes() == server.content


def test_silence_ends_with_the_deadline(server: Server, target: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TooSlow):
        download([server.address("silent")], target, md5(server.content), deadline_seconds=0.3)
    assert time.monotonic() - began < 2.5


def test_a_killed_process_is_taken_over_from(server: Server, target: Path) -> None:
    code = "import sys, pathlib, fastcifar.data.download as d; d.download([sys.argv[1]], pathlib.Path(sys.argv[2]), '')"
    with subprocess.Popen([sys.executable, "-c", code, server.address("slow"), str(target)]) as process:
        part = target.with_name("file.bin.part")
        while process.poll() is None and not (part.exists() and part.stat().st_size > 10_000):
            time.sleep(0.02)
        process.kill()
    download([server.address("good")], target, md5(server.content))
    assert target.read_bytes() == server.content
    assert left(target) == ["file.bin"]
    assert server.ranges[-1][1] is not None


def test_processes_take_turns(server: Server, target: Path) -> None:
    server.content = server.content[:100_000]
    arguments = [server.address("slow")], target, md5(server.content)
    threads = [threading.Thread(target=download, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == server.content
    assert left(target) == ["file.bin"]
    assert server.ranges == [("slow", None)]


def test_waiting_for_another_process_ends_with_the_deadline(server: Server, target: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    target.parent.mkdir()
    with target.with_name("file.bin.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TooSlow):
            download([server.address("good")], target, md5(server.content), deadline_seconds=0.3)
    download([server.address("good")], target, md5(server.content))
    assert left(target) == ["file.bin"]
