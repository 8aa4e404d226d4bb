"""DALI on the pretended GPU: its real graphs, by its CPU operators, with the rules of a GPU.

What is fed to an operator on the GPU must lie there, and DALI must copy it on the current stream; what comes out is for
the stream that was named.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_rules import PretendedGpu, unseen
from torch import Tensor

from fastcifar.augment import dali_apply
from fastcifar.data import loader

FROM_DLPACK = torch.from_dlpack


class Proxy:
    """A module of DALI in which some names are replaced."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.module, self.others = module, others

    def __getattr__(self, name: str) -> Any:
        return self.others.get(name) or getattr(self.module, name)


class Pipeline:
    def __init__(
        self, gpu: PretendedGpu, genuine: Any, batch_size: int, threads: int, device_id: int, **options: Any
    ) -> None:
        assert device_id == 0, "operators on the GPU need a device_id"
        self.gpu, self.pipeline = gpu, genuine(batch_size, threads, None, **options)
        self.read_in_place: list[Tensor] = []

    def __enter__(self) -> Any:
        return self.pipeline.__enter__()

    def __exit__(self, *raised: Any) -> Any:
        return self.pipeline.__exit__(*raised)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def feed_input(self, name: str, data: Any) -> None:
        if isinstance(data, Tensor):
            assert data.is_cuda, f"{name} is on the CPU"
            copy = data.clone()
            with unseen():
                self.read_in_place.append(copy)
                data = copy.numpy()
        self.pipeline.feed_input(name, data)

    def outputs(self, stream: Any) -> list[Any]:
        assert stream is self.gpu.stream
        with unseen():
            tensors = [FROM_DLPACK(output.as_tensor()).clone() for output in self.pipeline.outputs()]
        self.read_in_place.clear()
        return [SimpleNamespace(as_tensor=lambda tensor=tensor: self.gpu.take_in(tensor)) for tensor in tensors]


@pytest.fixture
def dali(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    genuine = dali_apply.import_dali()

    def external_source(*, device: str, no_copy: bool, **options: Any) -> Any:
        assert device == "cpu" or not no_copy, "DALI does not wait for what it reads in place"
        return genuine.fn.external_source(device="cpu", no_copy=True, **options)

    def constant(value: Any, device: str = "cpu", **options: Any) -> Any:
        return genuine.types.Constant(value, device="cpu", **options)

    pretended = SimpleNamespace(
        Pipeline=lambda *arguments, **options: Pipeline(gpu, genuine.Pipeline, *arguments, **options),
        fn=Proxy(genuine.fn, external_source=external_source),
        types=Proxy(genuine.types, Constant=constant),
        math=genuine.math,
    )
    monkeypatch.setattr(dali_apply, "import_dali", lambda: pretended)
    monkeypatch.setattr(torch, "from_dlpack", lambda tensor: tensor)
    loader.dali_works.cache_clear()
    yield
    loader.dali_works.cache_clear()
