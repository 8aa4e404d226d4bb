"""Every kernel compiles for every card, and spills on none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compilation import CARDS, all_compilations, compilations, compile_for
from harness import needs_kernels
from op_specs.averaging import SPEC

from fastcifar.kernels import averaging

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

# A block's limit where the launcher opts in, in KB; NVIDIA, "CUDA C++ Programming Guide", table of technical
# specifications.
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

TOOL = Path(__file__).parents[2] / "tools" / "compile_kernels"


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card_without_spilling() -> None:
    finished = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines()[1:]]
    assert len(rows) == len(all_compilations()) * len(CARDS)
    for *_, card, registers, shared_memory, spills in rows:
        assert 0 < int(registers) < 256
        assert int(shared_memory) <= SHARED_MEMORY[int(card.removeprefix("sm_"))] * 1024
        assert int(spills) == 0


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "ema_kernel", averaging.ema_kernel.fn)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        all_compilations()


def test_spilled_registers_are_counted() -> None:
    (average,) = compilations(SPEC, SPEC.network_cases()[0], torch.float32)
    crowded = dataclasses.replace(average, options={**average.options, "BLOCK": 8192, "num_warps": 1})
    assert compile_for(crowded, 90).spills > 0
