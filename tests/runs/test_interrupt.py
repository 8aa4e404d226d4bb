"""A first signal is a request; a second one acts as the system's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fastcifar.runs.interrupt import SIGNALS, Interrupted, StopRequest

NOTICE = "stopping after this step; press Ctrl-C again to quit at once\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_said(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.signal_number is None
        os.kill(os.getpid(), number)
        assert request.signal_number == number
        assert capfd.readouterr().err == NOTICE
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_signal_is_answered_at_once_where_there_is_nothing_to_save(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as request, pytest.raises(Interrupted) as stopped, request.answered_at_once(Path("run")):
        os.kill(os.getpid(), number)
    assert stopped.value.signal_number == number
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_lost_terminal_is_no_request_below_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_stderr_does_not_matter() -> None:
    kept = os.dup(2)
    try:
        with StopRequest() as request:
            os.close(2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal_number == signal.SIGTERM
    finally:
        os.dup2(kept, 2)
        os.close(kept)
