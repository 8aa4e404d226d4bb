"""The averaging op beyond what `test_specs.py` makes of its declaration: exact bits, the running mean, traces for a
GPU, errors.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from fastcifar.kernels import averaging
from fastcifar.kernels.averaging import BLOCK, CPU_PIECE, SOURCE_DTYPES, ema_update_, ema_update_reference
from fastcifar.kernels.dispatch import KERNELS_EXIST

DECAYS = (0.99, 0.9, 0.999, 0.5)

needs_kernels = pytest.mark.skipif(not KERNELS_EXIST, reason="Triton is absent or FASTCIFAR_KERNELS=reference")


def arguments(size: int, dtype: torch.dtype = torch.float32, decay: float = 0.99) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    average = torch.randn(size, generator=generator)
    return average, torch.randn(size, generator=generator).to(dtype), torch.tensor(decay)


def test_pieces_on_a_cpu_change_no_bit() -> None:
    size = 2 * CPU_PIECE + 3
    averages, source, decays = torch.randn(2, size), torch.randn(size), torch.tensor(DECAYS[:2])
    expected = averages + (source - averages) * (1 - decays[:, None])
    ema_update_(averages, source, decays)
    assert torch.equal(averages, expected)


def test_several_decays_give_what_each_gives() -> None:
    averages, source, decays = torch.randn(4, 1025), torch.randn(1025), torch.tensor(DECAYS)
    alone = averages.clone()
    ema_update_(averages, source, decays)
    for average, decay in zip(alone, decays, strict=True):
        ema_update_(average, source, decay)
    assert torch.equal(averages, alone)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_by_decays_of_n_to_n_plus_1_it_is_the_running_mean_of_an_averaged_model(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(1024, 1, bias=False, dtype=torch.float32)
    theirs, exact = AveragedModel(model), AveragedModel(model.double())
    average = torch.zeros(1024)
    for count in range(20):
        source = torch.randn(1024).to(dtype)
        for averaged, wide in ((theirs, torch.float32), (exact, torch.float64)):
            model.weight.data = source.to(wide)[None]
            averaged.update_parameters(model)
        ema_update_(average, source, torch.tensor(count / (count + 1)))
    assert_as_accurate_as_torch(average, theirs.module.weight[0], exact.module.weight[0])


def test_decay_of_one_keeps_every_bit() -> None:
    average, source, decay = arguments(1025, decay=1.0)
    before = average.clone()
    ema_update_(average, source, decay)
    assert torch.equal(average, before)


def test_an_empty_bucket_is_left_alone() -> None:
    ema_update_(*arguments(0))
    averaging.launch_ema_update(None, *arguments(0))


def test_no_gradient_flows() -> None:
    average, source, decay = arguments(1025)
    for update in (ema_update_, ema_update_reference):
        update(average, source.requires_grad_(), decay)
        assert not average.requires_grad


def test_compiles_to_one_graph_for_every_decay() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    def update(average: Tensor, source: Tensor, decay: Tensor) -> Tensor:
        ema_update_(average, source, decay)
        return average.sum()

    compiled = torch.compile(update, fullgraph=True, backend=record)
    for decay in (0.5, 0.9, 0.999):
        (average, source, scalar), (expected, _, _) = arguments(4099, decay=decay), arguments(4099)
        compiled(average, source.requires_grad_(), scalar)
        ema_update_reference(expected, source, scalar)
        assert torch.equal(average, expected)
    (graph,) = graphs
    assert torch.ops.fastcifar.ema_update_.default in {
        getattr(n.target, "default", n.target) for n in graph.graph.nodes
    }


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
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_mutates_the_averages() -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        averages, decays = torch.empty(2, 4099, device="cuda"), torch.empty(2, device="cuda")
        source = torch.empty(4099, device="cuda", dtype=torch.bfloat16)
        aot_function(ema_update_, record, keep_inference_input_mutations=True)(averages, source, decays)
    (graph,) = graphs
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [kernel.kwargs["tensors_to_clone"] for kernel in kernels] == [["averages_ptr"]]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("averages", torch.zeros(8, dtype=torch.float64), TypeError),
        ("averages", torch.zeros(1, 1, 8), ValueError),
        ("averages", torch.zeros(16)[::2], ValueError),
        ("averages", torch.zeros(8, requires_grad=True), ValueError),
        ("averages", torch.zeros(5, 8), ValueError),
        ("averages", torch.zeros(0, 8), ValueError),
        ("source", torch.zeros(8, dtype=torch.float64), TypeError),
        ("source", torch.zeros(7), ValueError),
        ("source", torch.zeros(1).expand(8), ValueError),
        ("source", torch.zeros(8, device="meta"), ValueError),
        ("decays", torch.tensor(0.9, dtype=torch.float64), TypeError),
        ("decays", torch.zeros(1), ValueError),
        ("decays", torch.zeros((), device="meta"), ValueError),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_a_bad_argument_is_named(name: str, value: Tensor, error: type[Exception]) -> None:
    good = dict(zip(("averages", "source", "decays"), arguments(8), strict=True))
    with pytest.raises(error, match=rf"^{name} must .*\.$"):
        ema_update_(**{**good, name: value})


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("padding", [BLOCK, BLOCK + 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("update", [ema_update_, torch.compile(ema_update_, fullgraph=True)], ids=["eager", "compiled"])
def test_the_kernel_equals_the_reference(update, padding: int, dtype: torch.dtype) -> None:
    """For a view amid zeros, from one amid NaNs; padding that is no multiple of 8 leaves them off the 16-byte grid."""
    average, source, decay = arguments(100_003, dtype)
    average_buffer = torch.zeros(average.numel() + 2 * padding, device="cuda")
    source_buffer = torch.full_like(average_buffer, torch.nan, dtype=dtype)
    average_view, source_view = average_buffer[padding:-padding], source_buffer[padding:-padding]
    average_view.copy_(average)
    source_view.copy_(source)
    update(average_view, source_view, decay.cuda())
    ema_update_reference(average, source, decay)
    assert torch.equal(average_view.cpu(), average)
    assert not average_buffer[:padding].any()
    assert not average_buffer[-padding:].any()
