"""The augmentation op beyond what its `OpSpec` says: its launch, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import CPU, make, needs_kernels
from op_specs import Case
from op_specs.augment import SPEC
from torch import Tensor

from fastcifar.kernels.augment import augment

EVERYTHING = Case("everything", {"count": 3, "size": (5, 8)})
NOTHING = dict.fromkeys(("index", "warp", "grey", "shift", "boxes"))


@needs_kernels
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("absent", [{}, NOTHING], ids=["everything", "images-alone"])
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_writes_the_output_alone(
    absent: dict[str, None], kernel_writes: Callable[..., list[list[str]]]
) -> None:
    given = {**make(SPEC, EVERYTHING, torch.bfloat16, CPU), **absent}
    names = [name for name, value in given.items() if isinstance(value, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        return augment(**{**given, **dict(zip(names, tensors, strict=True))})

    assert kernel_writes(call, *(given[name] for name in names)) == [["output_ptr"]]


@pytest.mark.gpu
@needs_kernels
def test_tensors_on_the_cpu_follow_the_images() -> None:
    given = make(SPEC, EVERYTHING, torch.bfloat16, CPU)
    assert torch.equal(augment(**{**given, "images": given["images"].cuda()}).cpu(), augment(**given))
