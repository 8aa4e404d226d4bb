"""What every op must pass, made from its `OpSpec`: accuracy, gradients, opcheck, compilation, the interpreter; on a
GPU, its kernels.

On a CPU an op runs its reference, at the small cases; on a GPU its kernels, at all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastcifar.kernels.compilation import all_compilations
from fastcifar.kernels.dispatch import KERNELS_EXIST
from fastcifar.kernels.spec import Arguments, Case, OpSpec, all_specs

SPECS = all_specs()
CPU = torch.device("cpu")
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def rows(
    specs: Iterable[OpSpec],
    devices: Iterable[str] = ("cpu", "cuda"),
    all_dtypes: bool = True,
    most_on_cpu: int | None = None,
) -> Any:
    """Parametrises over spec, case, dtype and device, on a CPU at most over so many cases of a spec."""
    parameters = [
        pytest.param(
            spec,
            case,
            dtype,
            torch.device(device),
            id=f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{device}",
            marks=[pytest.mark.gpu, needs_kernels] if device == "cuda" else [],
        )
        for device in devices
        for spec in specs
        for case in (spec.cases if device == "cuda" else spec.small_cases()[:most_on_cpu])
        for dtype in (spec.dtypes if all_dtypes else spec.dtypes[:1])
    ]
    return pytest.mark.parametrize(("spec", "case", "dtype", "device"), parameters)


def make(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Arguments:
    """The same arguments whenever called."""
    torch.manual_seed(0)
    return spec.make(case.shape, dtype, device)


def in_float64(arguments: Arguments) -> Arguments:
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """All tensors among arguments, each by its argument's name; those of a list are numbered."""
    named = {
        name: [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for name, value in arguments.items()
    }
    return {
        name if len(leaves) == 1 else f"{name}[{place}]": leaf
        for name, leaves in named.items()
        for place, leaf in enumerate(leaves)
    }


def outcome(
    spec: OpSpec, function: Callable[..., Any], arguments: Arguments, gradient: Tensor | None = None
) -> dict[str, Tensor]:
    """What a function computes, by name: its results and, given the gradient of the first of them, those of its
    arguments.

    The next result, if it has a gradient, has half the first one's.
    """
    leaves = tensors({name: arguments[name] for name in spec.differentiable}) if gradient is not None else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    results = spec.results(arguments, function(**arguments))
    found = {f"result {place}": result.detach() for place, result in enumerate(results)}
    if not leaves:
        return found
    returned = [result for result in results if result.requires_grad]
    given = [as_gradient_of(result, gradient / 2**place) for place, result in enumerate(returned)]
    gradients = torch.autograd.grad(returned, list(leaves.values()), given)
    return {**found, **{f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}}


def as_gradient_of(result: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the dtype and layout of a result; a smaller one as what a sum gives, expanded over the last
    dimension.
    """
    if gradient.shape != result.shape:
        return gradient.to(result.dtype).expand_as(result)
    return torch.empty_like(result).copy_(gradient)


def random_gradient(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, of_a_sum: bool = False
) -> Tensor | None:
    """A gradient of the first result, rounded to `dtype`, or None for an op without one; one of a sum over the last
    dimension has size 1 there."""
    if not spec.differentiable:
        return None
    arguments = in_float64(make(spec, case, dtype, device))
    shape = spec.results(arguments, spec.exact(**arguments))[0].shape
    return torch.randn((*shape[:-1], 1) if of_a_sum else shape, device=device).to(dtype)


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    run: Callable[..., Any] | None = None,
    gradient: Tensor | None = None,
    prepare: Callable[[Arguments], Arguments] = lambda arguments: arguments,
    measure: Callable[..., dict[str, Tensor]] = outcome,
) -> None:
    """Asserts that `run`, by default the op, is as accurate as torch and changes nothing but what it may.

    `prepare` lays out its arguments, and `measure` takes its outcome, where these differ from the rival's.
    """
    exact = outcome(spec, spec.exact, in_float64(make(spec, case, dtype, device)), gradient)
    theirs = outcome(spec, spec.rival, make(spec, case, dtype, device), gradient)
    arguments = prepare(make(spec, case, dtype, device))
    before = tree_map_only(Tensor, torch.clone, arguments)
    ours = measure(spec, run or spec.op, arguments, gradient)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, result in ours.items():
        assert_as_accurate_as_torch(result, theirs[name], exact[name], spec.multiple, name)
    kept = tensors({name: value for name, value in before.items() if name not in spec.mutates})
    changed = [name for name, tensor in kept.items() if not torch.equal(tensor, tensors(arguments)[name])]
    assert not changed, f"changed, though not among what it mutates: {', '.join(changed)}"


@rows(SPECS)
def test_is_as_accurate_as_torch(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device)


@rows(SPECS, devices=["cpu"])
def test_on_a_cpu_the_op_is_its_reference(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    ours, plain = (outcome(spec, function, make(spec, case, dtype, device)) for function in (spec.op, spec.reference))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(result, plain[name]) for name, result in ours.items())


@rows(DIFFERENTIABLE)
def test_gradients_are_as_accurate_as_torch(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device))


@rows(DIFFERENTIABLE, all_dtypes=False)
def test_gradients_behind_a_sum_are_as_accurate_as_torch(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device, of_a_sum=True))


@rows(SPECS, all_dtypes=False, most_on_cpu=8)
def test_compiles_to_one_graph(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Whole on a GPU; on a CPU, where compiling C++ takes long, for the first case, and the others as far as the
    graph of the backward.
    """
    whole = device.type == "cuda" or case is spec.small_cases()[0]
    torch.compiler.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend="inductor" if whole else "aot_eager")
    check(spec, case, dtype, device, run=compiled, gradient=random_gradient(spec, case, dtype, device))


class Calls(TorchDispatchMode):
    """Records the calls of registered ops, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fastcifar":
            self.calls.append(
                (function, *tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs)))
            )
        return function(*args, **kwargs)


@rows(SPECS, all_dtypes=False, most_on_cpu=2)
@pytest.mark.filterwarnings("ignore:.*non-deterministic")
def test_opcheck(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Of every registered op that runs, forward and backward; and of the op with its gradient, where it is itself a
    registered one.
    """
    gradient = random_gradient(spec, case, dtype, device)
    # Kept, since an argument may hold addresses of others.
    given = make(spec, case, dtype, device)
    with Calls() as recorded:
        outcome(spec, spec.op, given, gradient)
    if device.type == "cpu" and not recorded.calls:
        pytest.skip(f"{spec.name} calls no registered op on a CPU")
    assert recorded.calls
    assert {function._schema.name for function, _, _ in recorded.calls} <= set(spec.registered)
    for function, args, kwargs in recorded.calls:
        torch.library.opcheck(function, args, kwargs)
    if not spec.ops and gradient is not None:
        arguments = make(spec, case, dtype, device)
        for leaf in tensors({name: arguments[name] for name in spec.differentiable}).values():
            leaf.requires_grad_()
        torch.library.opcheck(spec.op, (), arguments)


def test_every_registered_op_is_declared() -> None:
    registered = {name for name in torch._library.custom_ops.OPDEFS if name.startswith("fastcifar::")}
    assert registered == {name for spec in SPECS for name in spec.registered}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_has_cases_of_both_kinds(spec: OpSpec) -> None:
    assert spec.small_cases()
    assert spec.network_cases()
    assert len({case.name for case in spec.cases}) == len(spec.cases)


@needs_kernels
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_its_kernels_are_seen_by_compile_caches_and_compiled_for_every_card(spec: OpSpec) -> None:
    compiled = [compilation.kernel for compilation in all_compilations()]
    for name in spec.registered:
        kernels = torch._library.triton.get_triton_kernels_for_op(name)
        assert kernels, f"{name} names no kernel in its body"
        assert all(kernel in compiled for kernel in kernels), f"a kernel of {name} is in no COMPILATIONS"


@pytest.mark.slow
@needs_kernels
def test_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("interpreted_specs.py")),
    ]
    finished = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_table_of_all_ops_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    tool = run_path(str(root / "tools" / "kernel_table"))
    committed = (root / "kernels" / "README.md").read_text()
    assert tool["replaced"](committed) == committed, "run tools/kernel_table --write kernels/README.md"


def outcome_of_graph(
    spec: OpSpec, function: Callable[..., Any], arguments: Arguments, gradient: Tensor | None
) -> dict[str, Tensor]:
    """`outcome`, forward and backward captured in a CUDA graph, which is then replayed once."""
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


@rows(SPECS, devices=["cuda"])
def test_in_a_captured_graph(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device), measure=outcome_of_graph)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device at most: none is not the current one")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_runs_on_a_gpu_that_is_not_the_current_one(spec: OpSpec) -> None:
    case, dtype, device = spec.small_cases()[0], spec.dtypes[-1], torch.device("cuda:1")
    check(spec, case, dtype, device, gradient=random_gradient(spec, case, dtype, device))


def add_scaled_(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """Adds `values * factor`, which it returns, to `total` in place: all (N,)."""
    product = values * factor
    total += product.detach()
    return product


def make_addends(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Arguments:
    total, values, factor = (torch.randn(shape["length"], device=device) for _ in range(3))
    return {"total": total, "values": values.to(dtype), "factor": factor.to(dtype)}


SOUND = OpSpec(
    op=add_scaled_,
    reference=add_scaled_,
    launch=add_scaled_,
    make=make_addends,
    exact=add_scaled_,
    rival=add_scaled_,
    cases=(Case("33", {"length": 33}),),
    bytes_moved=lambda arguments: 0,
    summary="",
    mutates=("total",),
    differentiable=("values", "factor"),
)


def inaccurate(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    return add_scaled_(total, values, factor) * 1.03


def leaves_one_unwritten(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    return torch.cat([add_scaled_(total, values, factor)[:-1], values.new_full((1,), torch.nan)])


def forgets_to_write(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    return add_scaled_(total.clone(), values, factor)


def writes_elsewhere(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    product = add_scaled_(total, values, factor)
    with torch.no_grad():
        factor.zero_()
    return product


def widens(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    return add_scaled_(total, values.float(), factor.float())


def adds_to_a_gradient(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    return add_scaled_(total, values, factor) + 0.03 * (values - values.detach())


UNSOUND = {
    inaccurate: "result 0 is .* from the exact one",
    leaves_one_unwritten: "result 0 is nan from the exact one",
    forgets_to_write: "result 1 is .* from the exact one",
    writes_elsewhere: "changed, .*: factor",
    widens: "result 0 is torch.float32, not torch.bfloat16",
}


def test_a_sound_op_passes() -> None:
    (case,) = SOUND.cases
    for dtype in SOUND.dtypes:
        for of_a_sum in (False, True):
            check(SOUND, case, dtype, gradient=random_gradient(SOUND, case, dtype, CPU, of_a_sum))


@pytest.mark.parametrize("op", UNSOUND, ids=lambda op: op.__name__)
def test_an_unsound_op_fails(op: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=UNSOUND[op]):
        check(replace(SOUND, op=op), SOUND.cases[0], torch.bfloat16)


def test_a_wrong_gradient_fails() -> None:
    gradient = random_gradient(SOUND, SOUND.cases[0], torch.bfloat16, CPU)
    with pytest.raises(AssertionError, match=r"gradient of values is .* from the exact one"):
        check(replace(SOUND, op=adds_to_a_gradient), SOUND.cases[0], torch.bfloat16, gradient=gradient)


def test_a_multiple_overrides_the_table() -> None:
    check(replace(SOUND, op=inaccurate, multiple={torch.bfloat16: 20.0}), SOUND.cases[0], torch.bfloat16)
