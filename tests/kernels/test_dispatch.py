"""Where ops run: the switch, the missing Triton, and cards below Triton's floor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from runpy import run_path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcifar.kernels import dispatch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from types import SimpleNamespace
from fastcifar.kernels.averaging import ema_update_
from fastcifar.kernels.dispatch import use_triton

average = torch.zeros(5)
ema_update_(average, torch.ones(5), torch.tensor(0.5))
assert average.tolist() == [0.5] * 5
assert torch._library.triton.get_triton_kernels_for_op("fastcifar::ema_update_") == []
on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
assert not use_triton(on_a_gpu) and not use_triton(on_a_gpu)
"""


def test_without_triton_the_reference_runs_and_a_gpu_is_told_once() -> None:
    environment = {**os.environ, "FASTCIFAR_KERNELS": "triton"}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "fastcifar: ops run as plain torch, without their kernels: Triton is not installed.\n"


def test_the_switch_makes_no_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTCIFAR_KERNELS", "reference")
    switched = run_path(dispatch.__file__)
    function = object()
    assert switched["jit"](function) is function
    assert not switched["KERNELS_EXIST"]
    assert not switched["use_triton"](SimpleNamespace(device=torch.device("cuda")))
    assert capsys.readouterr().err == ""


def test_a_misspelt_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_KERNELS", "off")
    with pytest.raises(ValueError, match=r"^FASTCIFAR_KERNELS must be 'triton' or 'reference', not 'off'\.$"):
        run_path(dispatch.__file__)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stands in for a tensor on a card; set `capability` to choose the card."""
    card = SimpleNamespace(device=torch.device("cuda:0"), capability=(9, 0))
    monkeypatch.setattr(dispatch, "SWITCH", "triton")
    card.driver = SimpleNamespace(active=SimpleNamespace(utils="compiled"))
    monkeypatch.setattr(dispatch, "triton", SimpleNamespace(runtime=card))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1060")
    dispatch.obstacle.cache_clear()
    dispatch.say_once.cache_clear()
    yield card
    dispatch.obstacle.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (12, 0)])
def test_a_card_that_triton_serves_runs_kernels(
    card: SimpleNamespace, capability: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    card.capability = capability
    assert dispatch.use_triton(card)
    assert capsys.readouterr().err == ""


def test_a_card_too_old_is_named_once(card: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    card.capability = (6, 1)
    assert not dispatch.use_triton(card)
    assert not dispatch.use_triton(card)
    assert capsys.readouterr().err == (
        "fastcifar: ops run as plain torch, without their kernels: GeForce GTX 1060 is sm_61, older than sm_75.\n"
    )


def test_triton_that_cannot_start_leaves_the_references(
    card: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton cannot start in a slim container without a C compiler."""
    message = "Failed to find C compiler. Please specify via CC environment variable."
    card.driver = mock.Mock(spec=["active"])
    type(card.driver).active = mock.PropertyMock(side_effect=RuntimeError(message))
    assert not dispatch.use_triton(card)
    assert "kernels: the driver of Triton cannot start (Failed to find C compiler)" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_kernel_is_missed_without_a_gpu(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not dispatch.use_triton(torch.empty(1, device=device))
    assert capsys.readouterr().err == ""


def test_kernels_are_launched_on_the_device_of_their_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int | None] = [None]
    launches = []

    @contextmanager
    def choose(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    kernel = {(7,): lambda *arguments, **options: launches.append((current[-1], options))}
    monkeypatch.setattr(torch.cuda, "device", choose)
    dispatch.launch(kernel, (7,), torch.ones(1), BLOCK=8)
    with FakeTensorMode():
        x, y = torch.ones(1, device="cuda:1"), torch.ones(1, device="cuda:0")
        dispatch.launch(kernel, (7,), x, y, BLOCK=8)  # a compiler that traces sees to the device itself
        monkeypatch.setattr(dispatch, "is_traced", lambda tensor: False)
        dispatch.launch(kernel, (7,), x, y, BLOCK=8)
    assert launches == [(None, {"BLOCK": 8})] * 2 + [(1, {"BLOCK": 8})]
