"""The moving average of all weights: the op against torch's multi-tensor one, over the parameters of resnet_prop."""

from __future__ import annotations

import pytest
import torch
from conftest import measure

from fastcifar.averaging import Buckets
from fastcifar.kernels.averaging import ema_update_
from fastcifar.models import build_model

BYTES_PER_PARAMETER = 3 * 4
"""Average read and written, source read, in float32."""


@pytest.fixture(scope="module")
def model(device):
    return build_model("resnet_prop").to(device)


@pytest.mark.benchmark(group="EMA of resnet_prop")
def test_torch_foreach(benchmark, model, device, copy_bandwidth):
    """`torch.optim.swa_utils.get_ema_multi_avg_fn`'s expression."""
    sources = [parameter.detach() for parameter in model.parameters()]
    averages = [source.clone() for source in sources]
    median = measure(benchmark, lambda: torch._foreach_lerp_(averages, sources, 0.001), device)
    report(benchmark, sum(map(torch.numel, sources)), median, copy_bandwidth)


@pytest.mark.benchmark(group="EMA of resnet_prop")
def test_op(benchmark, model, device, copy_bandwidth):
    source = Buckets(model).flat[0]
    average, decay = source.clone(), torch.tensor(0.999, device=device)
    median = measure(benchmark, lambda: ema_update_(average, source, decay), device)
    report(benchmark, source.numel(), median, copy_bandwidth)


def report(benchmark, elements: int, median: float, copy_bandwidth: float) -> None:
    moved = elements * BYTES_PER_PARAMETER
    benchmark.extra_info.update(bytes_moved=moved, bytes_per_second=moved / median, share_of_copy_bandwidth=moved / median / copy_bandwidth)
