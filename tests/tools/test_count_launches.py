"""How many kernels a compiled step launches, by `tools/count_launches`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from fastcifar.kernels.dispatch import KERNELS_EXIST

pytestmark = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")

TOOL = Path(__file__).parents[2] / "tools" / "count_launches"
CODE = """
def call(self, args):
    triton_red_fused_mean_1.run(arg0, 128)
    triton_poi_fused__to_copy_0.run(arg0, 128)
    triton_poi_fused__to_copy_t_12.run(arg0, 128)
    triton_poi_fused__to_copy_add_3.run(arg0, 128)
    statistics_kernel_0.run(arg0, 128)
    buf1 = extern_kernels.convolution(arg0, arg1, stride=(1, 1))
    buf2 = torch.ops.aten.convolution_backward.default(buf1, arg0, arg1, [0], [1, 1], 1, [True, True, False])
    buf3 = torch.ops.aten.convolution_backward.default(buf1, arg0, arg1, [0], [1, 1], 1, [False, True, False])
    extern_kernels.addmm(arg0, arg1, alpha=1)
    buf4 = torch.ops.aten.sort.default(arg0)
    assert_size_stride(buf4, (1,), (1,))
"""


@pytest.mark.slow
def test_every_launch_is_counted_by_its_kind() -> None:
    expected = {"convolutions": 4, "matrix products": 1, "own": 1, "casts": 2, "generated": 2, "other": 1}
    assert dict(run_path(str(TOOL))["launches"](CODE)) == expected


@pytest.mark.slow
def test_a_step_of_resnet20_v2_launches_what_it_must() -> None:
    """Besides convolutions, it launches our four kernels for each of 18 norms, and a few more.

    These are a sum of gradients in each of two blocks that project, and ten at the ends.
    """
    done = subprocess.run([sys.executable, TOOL, "resnet20_v2"], check=True, capture_output=True, text=True)
    names, _, line = ([cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines())
    found = {name: int(cell) for name, cell in zip(names, line, strict=True) if cell.isdecimal()}
    assert found["convolutions"] == 1 + 3 * 20 + 1
    assert found["own"] == 4 * 18
    assert found["casts"] == 0, "the weights are cast outside"
    assert found["generated"] + found["matrix products"] + found["other"] <= 2 + 10
