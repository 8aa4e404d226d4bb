"""The averaging op beyond what its `OpSpec` says: pieces, the running mean, launches, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import needs_kernels
from tolerances import assert_as_accurate_as_torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fastcifar.kernels.averaging import BLOCK, CPU_PIECE, ema_update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_pieces_on_a_cpu_change_no_bit() -> None:
    size = 2 * CPU_PIECE + 3
    averages, source, decays = torch.randn(2, size), torch.randn(size), torch.tensor([0.99, 0.9])
    expected = averages + (source - averages) * (1 - decays[:, None])
    ema_update_(averages, source, decays)
    assert torch.equal(averages, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def test_no_gradient_flows() -> None:
    average = torch.randn(1025)
    ema_update_(average, torch.randn(1025, requires_grad=True), torch.tensor(0.5))
    assert not average.requires_grad


def test_compiles_to_one_graph_for_every_decay() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ema_update_, fullgraph=True, backend=record)
    for decay in (0.5, 0.9, 0.999):
        compiled(torch.zeros(4099), torch.ones(4099), torch.tensor(decay))
    assert len(graphs) == 1


@needs_kernels
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_on_a_gpu_the_compiled_step_holds_one_kernel_that_writes_the_averages(
    kernel_writes: Callable[..., list[list[str]]],
) -> None:
    given = torch.empty(2, 4099), torch.empty(4099, dtype=torch.bfloat16), torch.empty(2)
    assert kernel_writes(ema_update_, *given) == [["averages_ptr"]]


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [BLOCK, BLOCK + 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("update", [ema_update_, torch.compile(ema_update_, fullgraph=True)], ids=["eager", "compiled"])
def test_kernels_stay_within_views(update: Callable[..., None], padding: int, dtype: torch.dtype) -> None:
    """A view amid zeros is averaged with one amid NaNs; padding that is no multiple of 8 leaves the 16-byte grid."""
    average, source, decay = torch.randn(100_003), torch.randn(100_003).to(dtype), torch.tensor(0.99)
    average_buffer = torch.zeros(average.numel() + 2 * padding, device="cuda")
    source_buffer = torch.full_like(average_buffer, torch.nan, dtype=dtype)
    average_view, source_view = average_buffer[padding:-padding], source_buffer[padding:-padding]
    average_view.copy_(average)
    source_view.copy_(source)
    update(average_view, source_view, decay.cuda())
    ema_update_(average, source, decay)
    assert torch.equal(average_view.cpu(), average)
    assert not average_buffer[:padding].any()
    assert not average_buffer[-padding:].any()
