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


def show(terminal: bool, monkeypatch: pytest.MonkeyPatch, width: int = 80, **changes: object) -> str:
    """The output of two epochs of four steps of 128 images, without the colours."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    output = io.StringIO()
    console = Console(RichConsole(file=output, force_terminal=terminal, width=width, highlight=False, soft_wrap=True))
    console.begin(0, 8, 128)
    for step in range(8):
        running = (None, None) if step % 4 == 0 else (2.0 - step / 10, step / 10)
        console.tick(step + 1, step // 4 + 1, 2, 0.1, *running)
        if step % 4 == 3:
            console.write(record(step // 4 + 1, **changes))
    console.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_the_live_line_shows_this_epochs_loss_beside_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    live = [
        frame for frame in re.split(r"[\r\n]+", show(True, monkeypatch)) if frame.startswith("epoch") and "━" in frame
    ]
    beginnings = [frame.split("━")[0].rstrip() for frame in live]
    assert beginnings[:3] == [
        "epoch 1/2  lr 0.1000",
        "epoch 1/2  loss 1.9000  train 10.00%  lr 0.1000",
        *beginnings[2:3],
    ]
    assert "epoch 2/2  lr 0.1000" in beginnings, "the loss of the epoch before is not shown as that of this one"
    assert beginnings[-1] == "epoch 2/2  loss 1.3000  train 70.00%  lr 0.1000"


@pytest.mark.parametrize("width", [72, 80, 200])
def test_the_live_line_fits_and_nothing_is_glued_to_the_bar(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    frames = [
        frame.rstrip() for frame in re.split(r"[\r\n]+", show(True, monkeypatch, width)) if re.match("epoch.*━", frame)
    ]
    assert frames
    for frame in frames:
        assert len(frame) <= width
        assert re.search(r"lr 0\.1000 +[━╸╺ ]+ [0-9,]+ img/s (-:--:--|[0-9]:[0-9]{2}:[0-9]{2})$", frame), frame


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_an_epoch_stays(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    lines = [line for line in re.split(r"[\r\n]+", show(terminal, monkeypatch)) if " left " in line]
    assert [re.sub(r"left \S+$", "left", line.rstrip()) for line in lines] == [
        f"epoch {epoch}/2  loss 1.5000  train 25.00%  lr 0.1000  img/s 1,000  left" for epoch in (1, 2)
    ]
    assert lines[-1].rstrip().endswith("left 0:00:00")


MUCH = {"validation_accuracy": 0.5, "averaged_validation_accuracies": {"ema-0.999": 0.51}, "test_accuracy": 0.4}


def test_long_lines_are_broken_between_fields_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(True, monkeypatch, **MUCH)
    assert all(len(line.rstrip()) <= 80 for line in re.split(r"[\r\n]+", shown))
    first = shown.index(
        "epoch 1/2  loss 1.5000  train 25.00%  validation 50.00%  ema-0.999 51.00%\n  test 40.00%  lr 0.1000"
    )
    assert first >= 0


def test_piped_lines_stay_whole_and_nothing_else_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(False, monkeypatch, **MUCH).splitlines()
    assert len(lines) == 2
    assert "ema-0.999 51.00%  test 40.00%  lr 0.1000" in lines[0]


def printed(terminal: bool, width: int, folder: str, **changes: object) -> str:
    output = io.StringIO()
    rich = RichConsole(
        file=output, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    Console(rich).summary(replace(RESULT, **changes), folder)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_folder_is_never_cut_and_the_next_command_comes_last(terminal: bool) -> None:
    folder = "/a/long/path" * 9 + "/with space"
    lines = printed(terminal, 80, folder).replace("\n  ", " ").splitlines()
    assert any(folder in line for line in lines)
    assert lines[-1].split(maxsplit=1) == ["next", f"fastcifar eval '{folder}'"]


def test_the_summary_leaves_out_what_does_not_apply() -> None:
    shown = printed(False, 200, "run", validation_accuracy=None, chosen_epochs={})
    assert "50.00%" in shown
    assert not {"validation", "chosen"} & set(shown.split())


def test_waiting_is_a_line_where_the_output_is_piped_and_goes_in_a_terminal() -> None:
    for terminal in (False, True):
        output = io.StringIO()
        console = Console(
            RichConsole(file=output, force_terminal=terminal, width=80, highlight=False, color_system=None)
        )
        console.wait("Compiling")
        assert (console.status is not None) == terminal
        console.note("Compiled in 3.0 s.")
        assert console.status is None
        assert "Compiling" in output.getvalue()
        assert output.getvalue().rstrip().endswith("Compiled in 3.0 s.")


def test_silence(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    console = Silence()
    console.note("something")
    console.wait("something")
    console.begin(0, 8, 128)
    console.write(record(1))
    console.summary(RESULT, tmp_path)
    assert capsys.readouterr().out == ""
