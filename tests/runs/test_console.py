"""The display of a run: a live line in a terminal, plain lines where the output is piped."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from made_run import RESULT, record
from rich.console import Console as RichConsole

from fastcifar.runs import console as module
from fastcifar.runs.console import Console, Silence

MUCH = {"validation_accuracy": 0.5, "averaged_validation_accuracies": {"ema-0.999": 0.51}, "test_accuracy": 0.4}


def console_on(output: io.StringIO, terminal: bool, width: int = 80) -> Console:
    options = {"force_terminal": terminal, "width": width, "color_system": None}
    return Console(RichConsole(file=output, highlight=False, soft_wrap=True, **options))


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the lines of two epochs of four steps of 128 images."""

    def lines(terminal: bool, width: int = 80, **changes: Any) -> list[str]:
        seconds, output = iter(range(1000)), io.StringIO()
        monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
        console = console_on(output, terminal, width)
        console.begin(0, 8, 128)
        for step in range(8):
            running = (None, None) if step % 4 == 0 else (2.0 - step / 10, step / 10)
            console.tick(step + 1, step // 4 + 1, 2, 0.1, *running)
            if step % 4 == 3:
                console.write(record(step // 4 + 1, **changes))
        console.close()
        shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()))
        return [line.rstrip() for line in shown]

    return lines


@pytest.mark.parametrize("width", [72, 80, 200])
def test_the_live_line_fits_and_shows_this_epochs_loss_beside_its_number(show: Any, width: int) -> None:
    frames = [line for line in show(True, width) if re.match("epoch.*━", line)]
    for frame in frames:
        assert len(frame) <= width
        assert re.search(r"lr 0\.1000 +[━╸╺ ]+ [0-9,]+ img/s (-:--:--|[0-9]:[0-9]{2}:[0-9]{2})$", frame), frame
    beginnings = [frame.split("━")[0].rstrip() for frame in frames]
    assert beginnings[:2] == ["epoch 1/2  lr 0.1000", "epoch 1/2  loss 1.9000  train 10.00%  lr 0.1000"]
    assert "epoch 2/2  lr 0.1000" in beginnings, "the loss of the epoch before is not shown as that of this one"
    assert beginnings[-1] == "epoch 2/2  loss 1.3000  train 70.00%  lr 0.1000"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_an_epoch_stays(show: Any, terminal: bool) -> None:
    lines = [line for line in show(terminal) if " left " in line]
    assert [line.rsplit(maxsplit=1)[0] for line in lines] == [
        f"epoch {epoch}/2  loss 1.5000  train 25.00%  lr 0.1000  img/s 1,000  left" for epoch in (1, 2)
    ]
    assert lines[-1].endswith("left 0:00:00")


def test_long_lines_are_broken_between_fields_in_a_terminal_alone(show: Any) -> None:
    lines = show(True, **MUCH)
    assert all(len(line) <= 80 for line in lines)
    first = lines.index("epoch 1/2  loss 1.5000  train 25.00%  validation 50.00%  ema-0.999 51.00%")
    assert lines[first + 1].startswith("  test 40.00%  lr 0.1000")
    piped = [line for line in show(False, **MUCH) if line]
    assert len(piped) == 2
    assert "ema-0.999 51.00%  test 40.00%  lr 0.1000" in piped[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_summary(terminal: bool) -> None:
    """The folder is never cut, the next command comes last, and what does not apply is left out."""
    folder, output = "/a/long/path" * 9 + "/with space", io.StringIO()
    console_on(output, terminal).summary(replace(RESULT, validation_accuracy=None, chosen_epochs={}), folder)
    lines = output.getvalue().replace("\n  ", " ").splitlines()
    assert any(folder in line for line in lines)
    assert lines[-1].split(maxsplit=1) == ["next", f"fastcifar eval '{folder}'"]
    assert "50.00%" in output.getvalue()
    assert not {"validation", "chosen"} & set(output.getvalue().split())


@pytest.mark.parametrize("terminal", [True, False])
def test_waiting_is_a_line_where_the_output_is_piped_and_goes_in_a_terminal(terminal: bool) -> None:
    output = io.StringIO()
    console = console_on(output, terminal)
    console.wait("Compiling")
    assert (console.status is not None) == terminal
    console.note("Compiled in 3.0 s.")
    assert console.status is None
    assert "Compiling" in output.getvalue()
    assert output.getvalue().rstrip().endswith("Compiled in 3.0 s.")


def test_silence(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    console = Silence()
    console.wait("something")
    console.begin(0, 8, 128)
    console.write(record(1))
    console.summary(RESULT, tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_sees_progress_and_a_script_nothing(monkeypatch: pytest.MonkeyPatch, widgets: bool) -> None:
    assert isinstance(module.notebook_console(), Silence)
    monkeypatch.setattr(module, "RichConsole", partial(RichConsole, force_jupyter=True))
    monkeypatch.setattr(module, "find_spec", lambda name: object() if widgets else None)
    console = module.notebook_console()
    assert (type(console), console.live) == (Console, widgets)
