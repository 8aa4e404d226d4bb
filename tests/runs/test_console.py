"""What is seen of a run: a live line in a terminal, plain lines where the output is piped."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from made_run import RESULT, record
from rich.console import Console as RichConsole

from fastcifar.runs import console as module
from fastcifar.runs.console import Console, Silence


def show(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of two epochs of four steps of 128 images, without the colours."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    output = io.StringIO()
    console = Console(RichConsole(file=output, force_terminal=terminal, width=80, highlight=False, soft_wrap=True))
    console.begin(0, 8, 128)
    for step in range(8):
        console.tick(step + 1, step // 4 + 1, 2, 0.1)
        if step % 4 == 3:
            console.write(record(step // 4 + 1))
    console.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_the_live_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = re.split(r"[\r\n]+", show(True, monkeypatch))
    live = [frame for frame in frames if "━" in frame]
    first = next(frame for frame in live if frame.startswith("epoch 1/2"))
    assert "loss" not in first
    last = live[-1]
    assert last.startswith("epoch 2/2  loss 1.5000  train 25.00%  lr 0.1000 ")
    assert re.search(r"[0-9,]+ img/s ([0-9]+:[0-9]{2}:[0-9]{2}|-:--:--)\s*$", last)
    assert re.search(r" [0-9]+:[0-9]{2}:[0-9]{2}\s*$", live[-2])
    assert all(len(frame) <= 80 for frame in live)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_an_epoch_stays(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    lines = [line for line in re.split(r"[\r\n]+", show(terminal, monkeypatch)) if " left " in line]
    assert [re.sub(r"left \S+$", "left", line.rstrip()) for line in lines] == [
        f"epoch {epoch}/2  loss 1.5000  train 25.00%  lr 0.1000  img/s 1,000  left" for epoch in (1, 2)
    ]
    assert lines[-1].rstrip().endswith("left 0:00:00")


def test_nothing_else_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(show(False, monkeypatch).splitlines()) == 2


def test_the_summary_leaves_out_what_does_not_apply(tmp_path) -> None:
    output = io.StringIO()
    without = replace(RESULT, validation_accuracy=None, chosen_epochs={})
    Console(RichConsole(file=output, width=200)).summary(without, tmp_path)
    assert "50.00%" in output.getvalue()
    assert not {"validation", "chosen"} & set(output.getvalue().split())


def test_silence(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    console = Silence()
    console.note("something")
    console.begin(0, 8, 128)
    console.write(record(1))
    console.summary(RESULT, tmp_path)
    assert capsys.readouterr().out == ""
