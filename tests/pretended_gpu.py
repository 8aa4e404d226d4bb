"""A pretended GPU: tensors on `cuda:0` that lie on the CPU and are held to the rules of a real GPU.

Two modes of torch make it. The one over functions turns every `cuda` that a caller names into the CPU, and answers
`.device` by where a tensor pretends to be; the one over operators, which sees what autograd runs too, knows what reads
and writes what. Streams keep vector clocks, so work that was not waited for is found whatever order the CPU ran it in.
A graph is the tape of the operators between the beginning and the end of its capture: a replay runs these on the same
memory and no Python, so a value that Python read stays as it was.

A rule that is broken raises `Broken` on the spot, and again when the test ends, in case the code under test caught it:

- a host sync, or a copy from memory that is not pinned, within `steady()`;
- either of them in a capture;
- an operator over tensors of both devices, but for numbers;
- memory used by a stream that has not waited for the one that wrote it, or given back while another stream still reads
it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastcifar.data import loader
from fastcifar.kernels import dispatch
from fastcifar.models import layers

CARD = torch.device("cuda", 0)
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
PURGE_EVERY = 256
"""The number of launches after which memory is purged."""


class Broken(AssertionError):
    """Raised where a real GPU would have failed, waited or computed something else."""


class Stream:
    """A queue; `clock[s]` is how far in stream `s` it has waited."""

    def __init__(self, gpu: PretendedGpu, name: str) -> None:
        self.gpu, self.name, self.device, self.cuda_stream = gpu, name, CARD, id(self)
        self.clock: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        self.wait(other.clock)

    def wait(self, clock: dict[Stream, int]) -> None:
        for stream, time in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def is_capturing(self) -> bool:
        return self.gpu.tape is not None


class Event:
    """A place in a stream; its first query fails, as where the GPU is behind."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.clock, self.polls = gpu, {}, 0

    def record(self) -> None:
        self.clock, self.polls = dict(self.gpu.stream.clock), 0

    def query(self) -> bool:
        self.polls += 1
        if self.polls > 1:
            self.gpu.host.wait(self.clock)
        return self.polls > 1


@dataclass
class Memory:
    """A storage on the card, or a pinned one."""

    alive: StorageWeakRef
    pinned: bool
    owner: Stream
    """The stream that allocated it, to which it returns for reuse once given back."""
    written: tuple[Stream, int]
    readers: dict[Stream, int] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)
    graph: bool = False
    """Marks memory of a graph's pool, which is never given back."""


@dataclass
class Call:
    function: Any
    arguments: tuple
    options: dict[str, Any]
    results: Any

    def again(self) -> None:
        found = self.function(*self.arguments, **self.options)
        given = {storage_of(tensor) for tensor in tensors_in((self.arguments, self.options))}
        for old, new in zip(tensors_in(self.results), tensors_in(found), strict=True):
            if storage_of(old) not in given:
                old.copy_(new)


class Graph:
    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.tape = gpu, []

    def replay(self) -> None:
        self.gpu.fail("replay")
        self.gpu.replays += 1
        with unseen(), GENUINE_AUTOCAST("cpu", enabled=False):
            for call in self.tape:
                self.gpu.launch(call)
                call.again()


class PretendedGpu:
    """What a test may ask (the numbers of launches, captures and replays), and what it may set."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.host, self.default = Stream(self, "host"), Stream(self, "default")
        self.streams = [self.default]
        self.broken: list[str] = []
        self.tape: list[Call] | None = None
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        self.allocations = self.launches = self.captures = self.replays = 0
        self.strict, self.sync_debug_mode = False, "default"
        self.capability = (9, 0)
        self.failures: dict[str, Exception] = {}
        """Errors raised by the next capture, replay or compile."""

    @property
    def stream(self) -> Stream:
        return self.streams[-1]

    def breaks(self, rule: str) -> None:
        """Notes and raises the rule, with the line of the code under test."""
        ours = [f for f in inspect.stack()[2:] if "/fastcifar/" in f.filename or "/kernels/" in f.filename]
        places = [f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in ours[:3]]
        self.broken.append(f"{rule} ({'; '.join(places)})")
        raise Broken(self.broken[-1])

    @contextlib.contextmanager
    def steady(self, strict: bool = True) -> Iterator[None]:
        """Forbids the host to wait or to copy from memory that is not pinned, within; with False it may again."""
        was, self.strict = self.strict, strict
        try:
            yield
        finally:
            self.strict = was

    def fail(self, what: str) -> None:
        if what in self.failures:
            raise self.failures.pop(what)

    def of(self, tensor: Tensor) -> Memory | None:
        memory = self.memories.get(storage_of(tensor))
        return memory if memory is not None and not memory.alive.expired() else None

    def on_card(self, tensor: Tensor) -> bool:
        memory = self.of(tensor)
        return memory is not None and not memory.pinned

    def take_in(self, tensor: Tensor, pinned: bool = False) -> Tensor:
        """Makes the memory of `tensor` count as the card's, written just now."""
        if self.of(tensor) is None:
            now = (self.stream, self.stream.clock[self.stream])
            reference = StorageWeakRef(tensor.untyped_storage())
            self.allocations += 1
            self.memories[storage_of(tensor)] = Memory(reference, pinned, self.stream, now, graph=self.tape is not None)
        return tensor

    def sync(self, what: str) -> None:
        if self.tape is not None:
            self.breaks(f"{what} waits in a capture")
        self.wait_for(self.stream.clock, what)

    def wait_for(self, clock: dict[Stream, int], what: str) -> None:
        if self.strict:
            self.breaks(f"{what} waits for the GPU in a steady epoch")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        self.host.wait(clock)

    def synchronize(self, device: object = None) -> None:
        used = {stream for memory in self.memories.values() for stream in (memory.owner, *memory.readers)}
        for stream in used.union(self.streams):
            self.wait_for(stream.clock, "synchronize()")

    def upload(self, origin: Tensor, what: str) -> None:
        if (self.strict or self.tape is not None) and self.of(origin) is None and origin.numel():
            self.breaks(f"{what} of {tuple(origin.shape)} to the GPU from memory that is not pinned")

    def launch(self, call: Call) -> None:
        """Notes that the stream runs an operator, whose inputs must have been waited for, and moves its time on."""
        stream, function = self.stream, call.function
        self.launches += 1
        stream.wait(self.host.clock)
        stream.clock[stream] += 1
        now = stream.clock[stream]
        results = tensors_in(call.results)
        written = {storage_of(tensor) for tensor in (*changed_by(function, call.arguments, call.options), *results)}
        for tensor in tensors_in((call.arguments, call.options)):
            memory = self.of(tensor)
            if memory is None or memory.pinned:
                continue
            waited_for = [memory.written, *(memory.readers.items() if storage_of(tensor) in written else ())]
            for other, time in waited_for:
                if stream.clock.get(other, 0) < time:
                    self.breaks(f"{function} on stream {stream.name} uses what {other.name} has not finished with")
            memory.readers[stream] = now
        for tensor in results:
            self.take_in(tensor)
        for storage in written & self.memories.keys():
            self.memories[storage].written = (stream, now)
        if self.launches % PURGE_EVERY == 0:
            self.purge()

    def purge(self) -> None:
        """Forgets memory that was given back; a stream that still read it must have been recorded, or waited for."""
        for storage, memory in list(self.memories.items()):
            if not memory.alive.expired():
                continue
            del self.memories[storage]
            owner, safe = memory.owner, memory.recorded | {memory.owner}
            late = [s.name for s, time in memory.readers.items() if s not in safe and owner.clock.get(s, 0) < time]
            if late and not (memory.pinned or memory.graph):
                self.breaks(f"memory of stream {owner.name} was given back while {late[0]} read it; use record_stream")

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """Stands for `torch.cuda.graph`: what is launched goes on the tape, and changes nothing."""
        self.synchronize()
        self.fail("capture")
        random, self.tape, self.saved = torch.get_rng_state(), [], {}
        self.streams.append(stream or Stream(self, "capture"))
        try:
            yield
            graph.tape = self.tape
            self.captures += 1
        finally:
            self.tape = None
            self.streams.pop()
            with unseen():
                for target, kept in self.saved.values():
                    target.copy_(kept)
                torch.set_rng_state(random)

    @contextlib.contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        self.streams.append(stream or self.stream)
        try:
            yield
        finally:
            self.streams.pop()


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


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def changed_by(function: Any, arguments: tuple, options: dict[str, Any]) -> list[Tensor]:
    schema = function._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, arguments, strict=False)} | options
    written = [argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return tensors_in([values.get(name) for name in written])


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


GENUINE_AUTOCAST = torch.autocast


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
