from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compilation import MODULES
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode


def writes_of(function: Callable[..., Any], *given: Any) -> list[list[str]]:
    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode() as mode, torch.no_grad():
        fakes = [mode.from_tensor(value).to("cuda") if isinstance(value, Tensor) else value for value in given]
        aot_function(function, record, keep_inference_input_mutations=True)(*fakes)
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return [kernel.kwargs["tensors_to_clone"] for kernel in kernels]


@pytest.fixture
def kernel_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Lists what each kernel of a function's graph writes, for tensors like those given on an absent sm_90."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for module in MODULES:
        monkeypatch.setattr(module, "use_triton", lambda tensor: tensor.device.type == "cuda")
    return writes_of
