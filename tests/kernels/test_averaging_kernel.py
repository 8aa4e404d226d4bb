"""The averaging ops on the CPU, traced for a GPU, in Triton's interpreter, and (marked) on a GPU."""

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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastcifar.averaging import decay_table
from fastcifar.kernels import averaging
from fastcifar.kernels.averaging import (
    BLOCK,
    CPU_PIECE,
    SOURCE_DTYPES,
    ema_update_,
    ema_update_reference,
    ema_warm_up_,
    swa_update_,
    swa_update_reference,
)
from fastcifar.kernels.dispatch import KERNELS_EXIST

SIZES = (1, 2, 127, 511, 513, BLOCK - 1, BLOCK, BLOCK + 1, 4099, 100_003)
DECAYS = (0.99, 0.9, 0.999, 0.5)

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


def test_pieces_on_a_cpu_change_no_bit() -> None:
    size = 2 * CPU_PIECE + 3
    averages, source, decays = torch.randn(2, size), torch.randn(size), torch.tensor(DECAYS[:2])
    expected = averages + (source - averages) * (1 - decays[:, None])
    ema_update_(averages, source, decays)
    assert torch.equal(averages, expected)
    count = torch.tensor(3)
    expected = averages[0] + (source - averages[0]) * (1 / (count + 1))
    swa_update_(averages[0], source, count)
    assert torch.equal(averages[0], expected)


def test_several_decays_give_what_each_gives() -> None:
    averages, source, decays = torch.randn(4, 1025), torch.randn(1025), torch.tensor(DECAYS)
    alone = averages.clone()
    ema_update_(averages, source, decays)
    for average, decay in zip(alone, decays, strict=True):
        ema_update_(average, source, decay)
    assert torch.equal(averages, alone)


def test_the_warm_up_is_that_of_the_table() -> None:
    step, decays = torch.tensor(0), torch.tensor([0.5, 0.99])
    averages = torch.randn(2, 1025)
    expected = averages.clone()
    for number, row in enumerate(decay_table(decays.tolist(), 200)):
        source = torch.randn(1025, generator=torch.Generator().manual_seed(number))
        ema_warm_up_(averages, source, decays, step)
        ema_update_(expected, source, row)
    assert torch.equal(averages, expected)
    assert step.item() == 200


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_the_running_mean_is_that_of_an_averaged_model(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(1024, 1, bias=False, dtype=torch.float32)
    theirs, exact = AveragedModel(model), AveragedModel(model.double())
    average, count = torch.full((1024,), torch.nan), torch.tensor(0)
    for _ in range(20):
        source = torch.randn(1024).to(dtype)
        for averaged, wide in ((theirs, torch.float32), (exact, torch.float64)):
            model.weight.data = source.to(wide)[None]
            averaged.update_parameters(model)
        swa_update_(average, source, count)
    assert_as_accurate_as_torch(average, theirs.module.weight[0], exact.module.weight[0])
    assert count.item() == theirs.n_averaged.item() == 20


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


def test_an_empty_bucket_is_left_alone_but_counted() -> None:
    step, count = torch.tensor(3), torch.tensor(4)
    ema_update_(*arguments(0))
    ema_warm_up_(*arguments(0), step)
    swa_update_(torch.zeros(0), torch.zeros(0), count)
    assert (step.item(), count.item()) == (4, 5)


def test_no_gradient_flows() -> None:
    average, source, decay = arguments(1025)
    ema_update_(average, source.requires_grad_(), decay)
    assert not average.requires_grad
    ema_update_reference(average, source, decay)
    assert not average.requires_grad


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


def test_counters_advance_in_a_compiled_graph() -> None:
    def update(averages: Tensor, average: Tensor, source: Tensor, decays: Tensor, step: Tensor, count: Tensor) -> None:
        ema_warm_up_(averages, source, decays, step)
        swa_update_(average, source, count)

    compiled = torch.compile(update, fullgraph=True)
    ours = [torch.randn(2, 4099), torch.randn(4099), torch.randn(4099), torch.tensor(DECAYS[:2]), torch.tensor(0), torch.tensor(0)]
    theirs = [tensor.clone() for tensor in ours]
    for _ in range(3):
        compiled(*ours)
        update(*theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert [counter.item() for counter in ours[-2:]] == [3, 3]


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
@pytest.mark.parametrize(
    ("op", "mutated"),
    [(ema_warm_up_, ["averages_ptr", "step_ptr"]), (swa_update_, ["average_ptr", "count_ptr"])],
    ids=["ema_warm_up", "swa"],
)
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_mutates_averages_and_counter(op: Callable[..., None], mutated: list[str]) -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        average, decay = torch.empty(4099, device="cuda"), torch.empty((), device="cuda")
        source = torch.empty(4099, device="cuda", dtype=torch.bfloat16)
        counter = torch.empty((), device="cuda", dtype=torch.int64)
        tensors = (average, source, decay, counter) if op is ema_warm_up_ else (average, source, counter)
        aot_function(op, record, keep_inference_input_mutations=True)(*tensors)
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [sorted(kernel.kwargs["tensors_to_clone"]) for kernel in kernels] == [mutated]


@needs_kernels
def test_compile_caches_see_the_kernel() -> None:
    assert torch._library.triton.get_triton_kernels_for_op("fastcifar::ema_update_") == [averaging.ema_kernel]
    assert torch._library.triton.get_triton_kernels_for_op("fastcifar::ema_warm_up_") == [averaging.ema_kernel]
    assert torch._library.triton.get_triton_kernels_for_op("fastcifar::swa_update_") == [averaging.swa_kernel]


BAD_FOR_BOTH = [
    ("source", torch.zeros(8, dtype=torch.float64), TypeError),
    ("source", torch.zeros(7), ValueError),
    ("source", torch.zeros(1).expand(8), ValueError),
    ("source", torch.zeros(8, device="meta"), ValueError),
]


def bad_averages(name: str) -> list[tuple[str, Tensor, type[Exception]]]:
    return [
        (name, torch.zeros(8, dtype=torch.float64), TypeError),
        (name, torch.zeros(1, 1, 8), ValueError),
        (name, torch.zeros(16)[::2], ValueError),
        (name, torch.zeros(8, requires_grad=True), ValueError),
    ]


def bad_counters(name: str) -> list[tuple[str, Tensor, type[Exception]]]:
    return [
        (name, torch.tensor(0, dtype=torch.int32), TypeError),
        (name, torch.zeros(1, dtype=torch.int64), ValueError),
        (name, torch.zeros((), dtype=torch.int64, device="meta"), ValueError),
    ]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *bad_averages("averages"),
        ("averages", torch.zeros(5, 8), ValueError),
        ("averages", torch.zeros(0, 8), ValueError),
        *BAD_FOR_BOTH,
        ("decays", torch.tensor(0.9, dtype=torch.float64), TypeError),
        ("decays", torch.zeros(1), ValueError),
        ("decays", torch.zeros((), device="meta"), ValueError),
        *bad_counters("step"),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_a_bad_argument_of_the_moving_average_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    good = dict(zip(("averages", "source", "decays"), arguments(8), strict=True))
    for op, others in ((ema_update_, {}), (ema_warm_up_, {"step": torch.tensor(0)})):
        if name in good or name in others:
            with pytest.raises(error, match=rf"^{name} must .*\.$"):
                op(**{**good, **others, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [*bad_averages("average"), ("average", torch.zeros(1, 8), ValueError), *BAD_FOR_BOTH, *bad_counters("count")],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_a_bad_argument_of_the_running_mean_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    good = {"average": torch.zeros(8), "source": torch.zeros(8), "count": torch.tensor(0)}
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        swa_update_(**{**good, name: value})


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


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 1025, 4096, 1_000_003])
def test_the_counting_kernels_equal_the_references_step_after_step(size: int, dtype: torch.dtype) -> None:
    ema = [torch.randn(3, size), torch.randn(size).to(dtype), torch.tensor(DECAYS[:3]), torch.tensor(0)]
    swa = [torch.randn(size), torch.randn(size).to(dtype), torch.tensor(0)]
    for op, reference, given in ((ema_warm_up_, ema_update_reference, ema), (swa_update_, swa_update_reference, swa)):
        on_gpu = [tensor.cuda() for tensor in given]
        for _ in range(20):
            op(*on_gpu)
            reference(*given)
        assert all(torch.equal(mine.cpu(), expected) for mine, expected in zip(on_gpu, given, strict=True))


@pytest.mark.gpu
@needs_kernels
def test_counters_advance_in_a_captured_graph() -> None:
    averages, source = torch.randn(2, 4099, device="cuda"), torch.randn(4099, device="cuda")
    decays, step = torch.tensor(DECAYS[:2], device="cuda"), torch.tensor(0, device="cuda")
    expected = [tensor.cpu() for tensor in (averages, source, decays, step)]
    ema_warm_up_(averages.clone(), source, decays, step.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_warm_up_(averages, source, decays, step)
    for _ in range(5):
        graph.replay()
        ema_update_reference(*expected)
    assert torch.equal(averages.cpu(), expected[0])
    assert step.item() == 5
