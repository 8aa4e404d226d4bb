"""Records of the epochs: what a resumed run writes again replaces what it had written."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_run import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

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


@pytest.mark.parametrize("epochs_done", [0, 1])
def test_events_past_the_checkpoint_are_purged(tmp_path: Path, epochs_done: int) -> None:
    for done, epochs, loss in ((0, (1, 2, 3), 1.0), (epochs_done, range(epochs_done + 1, 3), 2.0)):
        board = TensorBoard(tmp_path, done)
        for epoch in epochs:
            board.write(record(epoch, train_loss=loss))
        board.close()
    newest = max(tmp_path.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    sessions = [event.step for event in EventFileLoader(str(newest)).Load() if event.HasField("session_log")]
    assert sessions == [epochs_done + 1]
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    assert [(event.step, event.value) for event in scalars] == [(1, 1.0), (2, 2.0)][:epochs_done] + [
        (epoch, 2.0) for epoch in range(epochs_done + 1, 3)
    ]


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


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for sink in (lambda: JsonLines(tmp_path / "file" / "metrics.jsonl", 0), lambda: TensorBoard(tmp_path / "file", 0)):
        with pytest.raises(FastcifarError, match="cannot be written"):
            sink()
