"""What an op declares of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Arguments = dict[str, Any]
"""An op's arguments by name."""


@dataclass(frozen=True)
class Case:
    """One set of shapes to run an op at."""

    name: str
    """Readable, as part of a test's name: `17x5x8x3-tail`."""
    shape: Mapping[str, Any]
    """What `OpSpec.make` makes the arguments from."""
    of_a_network: bool = False
    """One of the real shapes, which the benchmark times and a GPU's tests run; the others are small and odd, and are
    tested anywhere. An op's first of them stands in the documentation and is the one that the benchmark times on a CPU,
    and so should be no large one.
    """


@dataclass(frozen=True)
class OpSpec:
    """An op, and how to tell that it is right and fast.

    Correctness: for each case and dtype, `results(arguments, op(**arguments))` must be as near to what `rival` computes
    in float64 as a small multiple of what `rival` computes in the dtype itself; the gradients of the arguments named in
    `differentiable` likewise, for random gradients of what it returns.
    """

    op: Callable[..., Any]
    """The registered op, or the differentiable function around it."""
    make: Callable[[Mapping[str, Any], torch.dtype, torch.device], Arguments]
    """Arguments for a case's shape, random from torch's global generator alone: tensors and plain values."""
    rival: Callable[..., Any]
    """What a PyTorch user would write, in the arguments' own dtypes: the yardstick of accuracy and speed, and in
    float64 the definition. Returns what `op` does, and writes where it does.
    """
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Arguments], int]
    """The least traffic of the op with memory, without its backward: every input read once and every output written
    once, in bytes.
    """
    summary: str
    """One sentence for the documentation."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    mutates: tuple[str, ...] = ()
    """Arguments written in place, which count among the results; all others must stay as they are."""
    differentiable: tuple[str, ...] = ()
    """Arguments that gradients flow to; those that are None are passed over."""
    multiple: Mapping[torch.dtype, float] | None = None
    """How many times PyTorch's own error is allowed, by the dtype of the result, where the table in `tolerances` does
    not suit; the reason stands beside it.
    """
    same_bits: bool = False
    """Whether the kernels give the bits of the reference."""
    ops: tuple[str, ...] = ()
    """The qualified names (`fastcifar::augment`) of the registered ops that `op` is made of, those of its backward
    included; empty where `op` is itself the one registered op.
    """

    @property
    def name(self) -> str:
        return getattr(self.op, "__name__", None) or self.op._name

    @property
    def registered(self) -> tuple[str, ...]:
        """The qualified names of all registered ops in it."""
        return self.ops or (self.op._qualname,)

    def results(self, arguments: Arguments, returned: Any) -> tuple[Tensor, ...]:
        """What is compared: what was returned, then what was written in place."""
        found = tree_leaves([returned, *(arguments[name] for name in self.mutates)])
        return tuple(result for result in found if isinstance(result, Tensor))

    def network_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.of_a_network)

    def small_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if not case.of_a_network)
