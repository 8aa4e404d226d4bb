"""A pretended GPU: tensors on `cuda:0` that lie on the CPU and are held to the rules of a real GPU.

Two modes of torch make it. The one over functions turns every `cuda` that a caller names into the CPU, and answers
`.device` by where a tensor pretends to be; the one over operators, which sees what autograd runs too, knows what reads
and writes what. What streams, memory and graphs may do is in `gpu_rules`.

A rule that is broken raises `Broken` on the spot, and again when the test ends, in case the code under test caught it:

- a host sync, or a copy from memory that is not pinned, within `steady()`;
- either of them in a capture;
- an operator over tensors of both devices, but for numbers;
- memory used by a stream that has not waited for the one that wrote it, or given back while another stream still reads
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_rules import (
    CARD,
    GENUINE_AUTOCAST,
    Call,
    Event,
    Graph,
    PretendedGpu,
    Stream,
    changed_by,
    storage_of,
    tensors_in,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.data import loader
from fastcifar.kernels import dispatch
from fastcifar.models import layers

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operators whose result, or whose result's shape, the host needs."""
COPYING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
READ_BY_HOST = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


class Operators(TorchDispatchMode):
    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.goal: bool | None = None
        """Whether tensors made now are on the card, where the caller said so."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        gpu, options = self.gpu, options or {}
        given = tensors_in((arguments, options))
        card = [tensor for tensor in given if gpu.on_card(tensor)]
        host = [tensor for tensor in given if not gpu.on_card(tensor)]
        if gpu.tape is not None and card:
            for tensor in changed_by(function, arguments, options):
                whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                gpu.saved.setdefault(storage_of(tensor), (whole, whole.clone()))
        if card:
            self.check(function, arguments, options, card, host)
        results = function(*arguments, **options)
        to_host = self.goal is False or (function is aten.copy_.default and not gpu.on_card(arguments[0]))
        if (card and not to_host) or (self.goal and not given):
            call = Call(function, arguments, options, results)
            if gpu.tape is None:
                gpu.launch(call)
            else:
                for tensor in tensors_in(results):
                    gpu.take_in(tensor)
                gpu.tape.append(call)
        return results

    def check(
        self, function: Any, arguments: tuple, options: dict[str, Any], card: list[Tensor], host: list[Tensor]
    ) -> None:
        gpu = self.gpu
        if function in WAITING:
            gpu.sync(str(function))
        elif function in COPYING:
            for tensor in host:
                if tensor is not arguments[0]:
                    gpu.upload(tensor, "a copy")
            if function is aten.copy_.default and not gpu.on_card(arguments[0]):
                asynchronous = gpu.of(arguments[0]) is not None and (arguments[2:] or [options.get("non_blocking")])[0]
                if not asynchronous:
                    gpu.sync("a copy to the CPU")
        elif function in INDEXING:
            for index in tensors_in(arguments[1]):
                if index.dtype in (torch.bool, torch.uint8):
                    gpu.sync("indexing by a mask")
                elif not gpu.on_card(index):
                    gpu.upload(index, "an index")
        elif function.namespace != "fastcifar" and any(tensor.dim() for tensor in host):
            gpu.breaks(f"{function} takes tensors of the CPU and of the GPU")  # our own operators upload them


class Functions(TorchFunctionMode):
    """Turns the device that callers name, and that tensors tell, into the pretended one and back."""

    def __init__(self, gpu: PretendedGpu, operators: Operators) -> None:
        super().__init__()
        self.gpu, self.operators = gpu, operators

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        gpu, options = self.gpu, dict(options or {})
        if function in READERS:
            return READERS[function](gpu, function, *arguments)
        if function in READ_BY_HOST and gpu.on_card(arguments[0]):
            gpu.sync(f"Tensor.{function.__name__}")
        if function in (Tensor.cpu, Tensor.cuda):
            function, arguments = Tensor.to, (arguments[0], "cpu" if function is Tensor.cpu else CARD)
        pinned = options.pop("pin_memory", False) or function is Tensor.pin_memory
        if function is Tensor.pin_memory:
            return gpu.take_in(self.made(False, Tensor.clone, arguments[:1], {}), pinned=True)
        named, arguments, options = without_device(function, arguments, options)
        if function is Tensor.to and named is not None:
            return self.moved(arguments, options, named)
        inherited = any(gpu.on_card(tensor) for tensor in tensors_in((arguments, options)))
        goal = named.type == "cuda" if named else (True if inherited else self.operators.goal)
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and goal and named:
            gpu.upload(torch.empty(1), function.__name__)
        result = self.made(goal, function, arguments, options)
        if isinstance(result, Tensor) and (pinned or (named and goal)):
            gpu.take_in(result, pinned)
        return result

    def made(self, goal: bool | None, function: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
        was, self.operators.goal = self.operators.goal, goal
        try:
            return function(*arguments, **options)
        finally:
            self.operators.goal = was

    def moved(self, arguments: tuple, options: dict[str, Any], device: torch.device) -> Tensor:
        """Does `Tensor.to` with a device; another device makes a copy, as a real one does."""
        gpu, origin = self.gpu, arguments[0]
        there, wanted = gpu.on_card(origin), device.type == "cuda"
        if there == wanted:
            return self.made(wanted, Tensor.to, arguments, options)
        if wanted:
            gpu.upload(origin, "Tensor.to")
        else:
            gpu.sync("Tensor.to")
        copy = self.made(wanted, Tensor.to, arguments, {**options, "copy": True})
        return gpu.take_in(copy) if wanted else copy


def device_told(gpu: PretendedGpu, getter: Any, tensor: Tensor) -> torch.device:
    return CARD if gpu.on_card(tensor) else getter(tensor)


def as_numpy(gpu: PretendedGpu, function: Any, tensor: Tensor, *rest: Any) -> Any:
    if gpu.on_card(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")
    return function(tensor)


READERS: dict[Any, Callable] = {
    Tensor.device.__get__: device_told,
    Tensor.is_cuda.__get__: lambda gpu, getter, tensor: gpu.on_card(tensor),
    Tensor.is_cpu.__get__: lambda gpu, getter, tensor: not gpu.on_card(tensor),
    Tensor.numpy: as_numpy,
    Tensor.is_pinned: lambda gpu, function, tensor: gpu.of(tensor) is not None and not gpu.on_card(tensor),
}


def without_device(
    function: Any, arguments: tuple, options: dict[str, Any]
) -> tuple[torch.device | None, tuple, dict[str, Any]]:
    """Returns the device that a call names, if any, and its arguments with the CPU in its place."""

    def is_device(value: Any) -> bool:
        return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"))

    found = [value for value in (*arguments[1:], options.get("device")) if is_device(value)]
    if function is torch.device or not found:
        return None, arguments, options
    cpu = torch.device("cpu")
    arguments = (*arguments[:1], *(cpu if is_device(value) else value for value in arguments[1:]))
    return torch.device(found[0]), arguments, {**options, "device": cpu} if "device" in options else options


def cuda_of(gpu: PretendedGpu) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="Pretended", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    nothing = ("init", "set_device", "manual_seed_all", "reset_peak_memory_stats", "empty_cache")
    return {
        **dict.fromkeys((*nothing, "set_per_process_memory_fraction"), lambda *arguments: None),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_90"],
        "mem_get_info": lambda device=None: (60 * 2**30, properties.total_memory),
        "max_memory_allocated": lambda device=None: 2**20,
        "memory_stats": lambda device=None: {"allocation.all.allocated": gpu.allocations},
        "synchronize": gpu.synchronize,
        "current_stream": lambda device=None: gpu.stream,
        "default_stream": lambda device=None: gpu.default,
        "stream": gpu.using,
        "Stream": lambda device=None, **options: Stream(gpu, "side"),
        "Event": lambda: Event(gpu),
        "CUDAGraph": lambda **options: Graph(gpu),
        "graph": gpu.capture,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: gpu.tape is not None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "sync_debug_mode", mode),
        "get_sync_debug_mode": lambda: gpu.sync_debug_mode,
    }


def grouped_by_place(gpu: PretendedGpu) -> Callable:
    """Groups an optimiser's tensors, since torch sorts them in C++, where all of them are the CPU's."""
    genuine = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: list, with_indices: bool = False) -> dict:
        found = genuine(lists, with_indices)
        placed = {True: CARD, False: torch.device("cpu")}
        return {(placed[gpu.on_card(group[0][0][0])], dtype): group for (_, dtype), group in found.items()}

    return grouped


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    pretended = PretendedGpu()
    for name, value in cuda_of(pretended).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "autocast", lambda device_type, **options: GENUINE_AUTOCAST("cpu", **options))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: pretended.of(tensor).recorded.add(stream))
    # Layers call their ops, as on a GPU, and these run their references.
    monkeypatch.setattr(dispatch, "obstacle", lambda device: "this GPU is pretended")
    monkeypatch.setattr(dispatch, "say_once", lambda line: None)
    monkeypatch.setattr(layers, "use_triton", lambda tensor: tensor.is_cuda)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: pretended.stream)
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped_by_place(pretended))
    operators = Operators(pretended)
    loader.dali_works.cache_clear()
    with operators, Functions(pretended, operators):
        yield pretended
    loader.dali_works.cache_clear()
    assert not pretended.broken, pretended.broken
