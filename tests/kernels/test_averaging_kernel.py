"""The averaging op on the CPU, traced for a GPU, in Triton's interpreter, and (marked) on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastcifar.kernels import averaging
from fastcifar.kernels.averaging import BLOCK, SOURCE_DTYPES, ema_update_, ema_update_reference
from fastcifar.kernels.dispatch import KERNELS_EXIST

SIZES = (1, 2, 127, BLOCK - 1, BLOCK, BLOCK + 1, 1023, 1024, 1025, 4099, 100_003)

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def arguments(size: int, dtype: torch.dtype = torch.float32, decay: float = 0.99, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    average = torch.randn(size, generator=generator)
    source = torch.randn(size, generator=generator).to(dtype)
    return average.to(device), source.to(device), torch.tensor(decay, device=device)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_is_as_accurate_as_torch(size: int, dtype: torch.dtype) -> None:
    average, source, decay = arguments(size, dtype)
    exact = average.double() + (1 - decay.double()) * (source.double() - average.double())
    theirs = average.clone()
    get_ema_multi_avg_fn(decay.item())([theirs], [source.float()], 1)
    ema_update_(average, source, decay)
    assert_as_accurate_as_torch(average, theirs, exact)


def test_stays_accurate_over_many_steps() -> None:
    average, _, decay = arguments(1025, decay=0.9)
    theirs, exact = average.clone(), average.double()
    for step in range(100):
        source = torch.randn(1025, generator=torch.Generator().manual_seed(step))
        ema_update_(average, source, decay)
        get_ema_multi_avg_fn(decay.item())([theirs], [source], step)
        exact += (1 - decay.double()) * (source - exact)
    assert_as_accurate_as_torch(average, theirs, exact)


def test_decay_of_one_keeps_every_bit() -> None:
    average, source, decay = arguments(1025, decay=1.0)
    before = average.clone()
    ema_update_(average, source, decay)
    assert torch.equal(average, before)


def test_decay_of_zero_takes_the_source() -> None:
    _, source, decay = arguments(1025, decay=0.0)
    average = torch.zeros(1025)
    ema_update_(average, source, decay)
    assert torch.equal(average, source)


def test_an_empty_bucket_is_left_alone() -> None:
    ema_update_(*arguments(0))


def test_no_gradient_flows() -> None:
    average, source, decay = arguments(1025)
    ema_update_(average, source.requires_grad_(), decay)
    assert not average.requires_grad
    ema_update_reference(average, source, decay)
    assert not average.requires_grad


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    average, source, decay = arguments(127, dtype)
    torch.library.opcheck(ema_update_, (average, source.requires_grad_(), decay))


def test_compiles_to_one_graph_for_every_decay() -> None:
    graphs = []

    def record_and_compile(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return torch._inductor.compile(graph, examples)

    def update(average: Tensor, source: Tensor, decay: Tensor) -> Tensor:
        ema_update_(average, source, decay)
        return average.sum()

    compiled = torch.compile(update, fullgraph=True, backend=record_and_compile)
    for decay in (0.5, 0.9, 0.999):
        (average, source, scalar), (expected, _, _) = arguments(4099, decay=decay), arguments(4099)
        compiled(average, source.requires_grad_(), scalar)
        ema_update_reference(expected, source, scalar)
        assert torch.equal(average, expected)
    (graph,) = graphs
    assert torch.ops.fastcifar.ema_update_.default in {getattr(n.target, "default", n.target) for n in graph.graph.nodes}


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch trace kernels for an sm_90 that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget

    pretended = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", pretended)
    monkeypatch.setattr(averaging, "use_triton", lambda tensor: tensor.device.type == "cuda")


@needs_kernels
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_mutates_the_average_alone() -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        average, decay = torch.empty(4099, device="cuda"), torch.empty((), device="cuda")
        source = torch.empty(4099, device="cuda", dtype=torch.bfloat16)
        aot_function(ema_update_, record, keep_inference_input_mutations=True)(average, source, decay)
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [kernel.kwargs["tensors_to_clone"] for kernel in kernels] == [["average_ptr"]]


@needs_kernels
def test_compile_caches_see_the_kernel() -> None:
    assert torch._library.triton.get_triton_kernels_for_op("fastcifar::ema_update_") == [averaging.ema_kernel]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("average", torch.zeros(8, dtype=torch.float64), TypeError),
        ("average", torch.zeros(2, 4), ValueError),
        ("average", torch.zeros(16)[::2], ValueError),
        ("average", torch.zeros(8, requires_grad=True), ValueError),
        ("source", torch.zeros(8, dtype=torch.float64), TypeError),
        ("source", torch.zeros(7), ValueError),
        ("source", torch.zeros(1).expand(8), ValueError),
        ("source", torch.zeros(8, device="meta"), ValueError),
        ("decay", torch.tensor(0.9, dtype=torch.float64), TypeError),
        ("decay", torch.zeros(1), ValueError),
        ("decay", torch.zeros((), device="meta"), ValueError),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_a_bad_argument_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    good = dict(zip(("average", "source", "decay"), arguments(8), strict=True))
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        ema_update_(**{**good, name: value})


@needs_kernels
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("interpreted_averaging.py"))]
    finished = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def assert_kernel_equals_reference(update: Callable[..., None], size: int, dtype: torch.dtype, padding: int) -> None:
    """Updates, on the GPU, a view amid zeros from one amid NaNs; padding that is no multiple of 8 leaves them off the 16-byte grid."""
    average, source, decay = arguments(size, dtype)
    average_buffer = torch.zeros(size + 2 * padding, device="cuda")
    source_buffer = torch.full((size + 2 * padding,), torch.nan, dtype=dtype, device="cuda")
    average_view, source_view = average_buffer[padding:-padding], source_buffer[padding:-padding]
    average_view.copy_(average)
    source_view.copy_(source)
    update(average_view, source_view, decay.cuda())
    ema_update_reference(average, source, decay)
    assert torch.equal(average_view.cpu(), average)
    assert not average_buffer[:padding].any()
    assert not average_buffer[-padding:].any()


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [BLOCK, BLOCK + 3], ids=["aligned", "unaligned"])
def test_the_kernel_equals_the_reference(size: int, dtype: torch.dtype, padding: int) -> None:
    assert_kernel_equals_reference(ema_update_, size, dtype, padding)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_the_compiled_kernel_equals_the_reference(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    assert_kernel_equals_reference(torch.compile(ema_update_, fullgraph=True), 4099, dtype, BLOCK)
