"""The rules that the pretended GPU of `pretended_gpu` keeps, over streams, memory and captured graphs.

Streams keep vector clocks, so work that was not waited for is found whatever order the CPU ran it in. A graph is the
tape of the operators between the beginning and the end of its capture: a replay runs these on the same memory and no
Python, so a value that Python read stays as it was.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

CARD = torch.device("cuda", 0)
GENUINE_AUTOCAST = torch.autocast
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
