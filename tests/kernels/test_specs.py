"""What every op must pass, as its `OpSpec` declares.

These are accuracy, gradients, opcheck, compilation, the interpreter and, on a GPU, its kernels. On a CPU an op runs its
reference, at the small cases; on a GPU its kernels, at all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from compilation import all_compilations
from harness import CPU, CUDA, assert_same_bits, check, make, needs_kernels, outcome, random_gradient, rows
from op_specs import SPECS, Arguments, Case, OpSpec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


@rows(SPECS)
def test_is_as_accurate_as_torch(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device)


@rows(DIFFERENTIABLE, all_dtypes=False, most_on_cpu=3)
def test_gradients_behind_a_sum_are_as_accurate_as_torch(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    check(spec, case, dtype, device, of_a_sum=True)


@rows([spec for spec in SPECS if spec.same_bits], devices=["cuda"])
def test_kernels_give_the_bits_of_the_reference(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    given = make(spec, case, dtype, CPU)
    on_gpu = tree_map_only(Tensor, Tensor.cuda, given)
    assert_same_bits(spec, outcome(spec, spec.op, on_gpu), outcome(spec, spec.op, given))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_repeat_every_bit(spec: OpSpec) -> None:
    case, dtype = spec.network_cases()[0], spec.dtypes[-1]
    gradient = random_gradient(spec, case, dtype, CUDA)
    first, second = (outcome(spec, spec.op, make(spec, case, dtype, CUDA), gradient) for _ in range(2))
    assert_same_bits(spec, first, second)


@rows(SPECS, all_dtypes=False, most_on_cpu=2)
def test_compiles_to_one_graph(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """On a CPU it goes as far as the graph of the backward: compiling C++ takes long."""
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    check(spec, case, dtype, device, run=torch.compile(spec.op, fullgraph=True, backend=backend))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastcifar":
            copies = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
            self.calls.append((function, *copies))
        return function(*args, **kwargs)


@rows(SPECS, all_dtypes=False, most_on_cpu=1)
@pytest.mark.filterwarnings("ignore:.*non-deterministic")
def test_opcheck(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    gradient = random_gradient(spec, case, dtype, device)
    with Calls() as recorded:
        outcome(spec, spec.op, make(spec, case, dtype, device), gradient)
    assert {function._schema.name for function, _, _ in recorded.calls} == set(spec.registered)
    for function, args, kwargs in recorded.calls:
        torch.library.opcheck(function, args, kwargs)


def test_every_registered_op_is_declared() -> None:
    registered = {name for name in torch._library.custom_ops.OPDEFS if name.startswith("fastcifar::")}
    assert registered == {name for spec in SPECS for name in spec.registered}


@needs_kernels
def test_kernels_are_seen_by_compile_caches_and_compiled_for_every_card() -> None:
    compiled = [compilation.kernel for compilation in all_compilations()]
    for name in (name for spec in SPECS for name in spec.registered):
        kernels = torch._library.triton.get_triton_kernels_for_op(name)
        assert kernels, f"{name} names no kernel in its body"
        assert all(kernel in compiled for kernel in kernels), f"no network case launches a kernel of {name}"


@pytest.mark.slow
@needs_kernels
def test_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_specs.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    finished = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_table_of_all_ops_is_up_to_date() -> None:
    tool = run_path(str(Path(__file__).parents[2] / "tools" / "kernel_table"))
    committed = tool["PAGE"].read_text()
    assert tool["replaced"](committed) == committed, "run tools/kernel_table"


def outcome_of_graph(
    spec: OpSpec, function: Callable[..., Any], arguments: Arguments, gradient: Tensor | None
) -> dict[str, Tensor]:
    """Returns `outcome` of a CUDA graph of forward and backward, which is replayed once."""
    spare = tree_map_only(Tensor, torch.clone, arguments)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(spec, function, spare, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = outcome(spec, function, arguments, gradient)
    graph.replay()
    return captured


@rows(SPECS, devices=["cuda"], all_dtypes=False)
def test_in_a_captured_graph(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, measure=outcome_of_graph)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device at most: none is not the current one")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_runs_on_a_gpu_that_is_not_the_current_one(spec: OpSpec) -> None:
    check(spec, spec.small_cases()[0], spec.dtypes[-1], torch.device("cuda:1"))


def add_scaled_(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    product = values * factor
    total += product.detach()
    return product


def make_addends(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Arguments:
    total, values, factor = (torch.randn(shape["length"], device=device) for _ in range(3))
    return {"total": total, "values": values.to(dtype), "factor": factor.to(dtype)}


SOUND = OpSpec(
    op=add_scaled_,
    make=make_addends,
    rival=add_scaled_,
    cases=(Case("33", {"length": 33}),),
    bytes_moved=lambda arguments: 0,
    summary="",
    mutates=("total",),
    differentiable=("values", "factor"),
)


def writes_elsewhere(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    product = add_scaled_(total, values, factor.clone())
    with torch.no_grad():
        factor.zero_()
    return product


UNSOUND = {
    "result 0 is .* from the exact one": lambda t, v, f: add_scaled_(t, v, f) * 1.03,
    "result 0 is nan from the exact one": lambda t, v, f: (
        add_scaled_(t, v, f).clone().index_fill(0, torch.tensor(32), torch.nan)
    ),
    "result 1 is .* from the exact one": lambda t, v, f: add_scaled_(t.clone(), v, f),
    "changed, .*: factor": writes_elsewhere,
    "result 0 is torch.float32, not torch.bfloat16": lambda t, v, f: add_scaled_(t, v.float(), f.float()),
    "gradient of values is .* from the exact one": lambda t, v, f: add_scaled_(t, v, f) + 0.03 * (v - v.detach()),
}
"""What the harness says of an op that is inaccurate, that leaves something unwritten, and so on."""


@pytest.mark.parametrize("dtype", SOUND.dtypes, ids=str)
def test_a_sound_op_passes(dtype: torch.dtype) -> None:
    check(SOUND, SOUND.cases[0], dtype, of_a_sum=True)


@pytest.mark.parametrize("message", UNSOUND)
def test_an_unsound_op_fails(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(
            SOUND,
            SOUND.cases[0],
            torch.bfloat16,
            run=lambda total, values, factor: UNSOUND[message](total, values, factor),
        )
