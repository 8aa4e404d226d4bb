"""Records of the epochs: what a resumed run writes again replaces what it had written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from made_run import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcifar.errors import FastcifarError
from fastcifar.runs.records import JsonLines, TensorBoard, read_records


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for epoch in (1, 2, 3):
        lines.write(record(epoch))
    lines.close()
    lines = JsonLines(path, 1)
    lines.write(record(2, train_loss=float("inf")))
    lines.close()
    assert read_records(path) == [record(1), record(2, train_loss=float("inf"))]


@pytest.mark.parametrize("kept", [0, 1])
def test_no_point_is_there_twice_or_missing(tmp_path: Path, kept: int) -> None:
    """The first session was killed in mid-write by a clock that ran ahead, and the second does not get to its end."""
    (tmp_path / "events.out.tfevents.9999999999.host.1.0").write_bytes(b"half a rec")
    for done in (0, kept):
        board = TensorBoard(tmp_path, [record(epoch) for epoch in range(1, done + 1)], print)
        for epoch in range(done + 1, 4):
            board.write(record(epoch, train_loss=2.0))
        board.final(3, {"weights": 0.5})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert points == [(epoch, 1.5 if epoch <= kept else 2.0) for epoch in (1, 2, 3)]
    assert [(event.step, event.value) for event in events.Scalars("accuracy/final_test/weights")] == [(3, 0.5)]


def test_a_viewer_drops_what_it_read_from_the_session_before(tmp_path: Path) -> None:
    board, viewer = TensorBoard(tmp_path, [], print), EventAccumulator(str(tmp_path))
    for epoch in (1, 2, 3):
        board.write(record(epoch))
    viewer.Reload()
    TensorBoard(tmp_path, [record(1)], print).write(record(2, train_loss=2.0))
    assert [(event.step, event.value) for event in viewer.Reload().Scalars("loss/train")] == [(1, 1.5), (2, 2.0)]


@pytest.mark.parametrize("failing", ["open", "write", "import"])
def test_tensorboard_fails_in_one_line_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    notes: list[str] = []
    if failing == "import":
        monkeypatch.setitem(sys.modules, "fastcifar.runs.events", None)
    board = TensorBoard(tmp_path / "nowhere" if failing == "open" else tmp_path, [], notes.append)
    if failing == "write":
        monkeypatch.setattr(board.file, "file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    board.write(record(1))
    board.final(1, {"weights": 0.5})
    board.close()
    assert len(notes) == 1
    assert re.fullmatch(r"TensorBoard has no more points \(.+\); the run goes on, and .*", notes[0])


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.file.close()
    lines.file = open("/dev/full", "w")  # noqa: SIM115
    sentence = r"metrics\.jsonl cannot be written \(No space left on device\); make room there"
    with pytest.raises(FastcifarError, match=sentence):
        lines.write(record(1))
    with pytest.raises(FastcifarError, match=sentence):
        lines.close()


def test_only_an_absent_file_holds_no_records(tmp_path: Path) -> None:
    """A file that cannot be read is not taken for one that is not there, and cut away."""
    assert read_records(tmp_path / "metrics.jsonl") == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "metrics.jsonl", tmp_path):
        with pytest.raises(FastcifarError, match=r"cannot be read \((Not a directory|it is no regular file)\)"):
            JsonLines(path, 0)
