"""Every kernel compiles for every card, and spills on none."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.kernels import averaging
from fastcifar.kernels.compilation import CARDS, all_compilations, compile_for
from fastcifar.kernels.dispatch import KERNELS_EXIST

pytestmark = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")

# A block's limit where the launcher opts in, in KB; NVIDIA, "CUDA C++ Programming Guide", table of technical
# specifications.
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

TOOL = Path(__file__).parents[2] / "tools" / "compile_kernels"


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run([sys.executable, str(TOOL)], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines()[1:]]
    assert len(rows) == len(all_compilations()) * len(CARDS)
    for *_, card, registers, shared_memory, spills in rows:
        assert 0 < int(registers) < 256
        assert int(shared_memory) <= SHARED_MEMORY[int(card.removeprefix("sm_"))] * 1024
        assert int(spills) == 0


def test_what_is_no_compiled_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = dataclasses.replace(averaging.COMPILATIONS[0], kernel=averaging.ema_kernel.fn)
    monkeypatch.setattr(averaging, "COMPILATIONS", [interpreted])
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        all_compilations()


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_spilled_registers_are_counted() -> None:
    crowded = dataclasses.replace(
        averaging.COMPILATIONS[0], constexprs={**averaging.COMPILATIONS[0].constexprs, "BLOCK": 16384}, num_warps=1
    )
    assert compile_for(crowded, 90).spills > 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_plain_average_needs_no_shared_memory() -> None:
    plain = [compilation for compilation in averaging.COMPILATIONS if compilation.kernel is averaging.ema_kernel][:3]
    assert {compile_for(compilation, 90).shared_memory for compilation in plain} == {0}
