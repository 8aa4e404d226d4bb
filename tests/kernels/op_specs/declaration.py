"""The declaration of an op."""

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
    name: str
    """A readable part of a test's name: `17x5x8x3-tail`."""
    shape: Mapping[str, Any]
    """The arguments of `OpSpec.make`."""
    of_a_network: bool = False
    """Marks a real shape, which the benchmark times and a GPU's tests run; the others are small and odd.

    Those are tested anywhere. An op's first real shape stands in the documentation and is the one that the benchmark
    times on a CPU, and so should not be large.
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
    """Makes arguments for a case's shape, random from torch's global generator alone: tensors and plain values."""
    rival: Callable[..., Any]
    """What a PyTorch user would write, in the arguments' own dtypes, to compare with.

    It is the yardstick of accuracy and speed, and in float64 the definition. It returns what `op` does, and writes
    where it does.
    """
    cases: tuple[Case, ...]
    bytes_moved: Callable[[Arguments], int]
    """The least bytes of memory traffic of the forward: every input read once and every output written once."""
    summary: str
    """One sentence for the documentation."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    mutates: tuple[str, ...] = ()
    """Arguments written in place, which count among the results; all others must stay as they are."""
    differentiable: tuple[str, ...] = ()
    """Arguments that gradients flow to; those that are None are passed over."""
    multiple: Mapping[torch.dtype, float] | None = None
    """How often PyTorch's own error is allowed, by the result's dtype, where `tolerances` does not suit.

    The reason stands beside it.
    """
    same_bits: bool = False
    """Whether the kernels give the bits of the reference."""
    ops: tuple[str, ...] = ()
    """The qualified names (`fastcifar::augment`) of the registered ops in `op`, its backward included.

    They are empty where `op` is itself the one registered op.
    """

    @property
    def name(self) -> str:
        return getattr(self.op, "__name__", None) or self.op._name

    @property
    def registered(self) -> tuple[str, ...]:
        return self.ops or (self.op._qualname,)

    def results(self, arguments: Arguments, returned: Any) -> tuple[Tensor, ...]:
        """Returns what to compare: what was returned, then what was written in place."""
        found = tree_leaves([returned, *(arguments[name] for name in self.mutates)])
        return tuple(result for result in found if isinstance(result, Tensor))

    def network_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.of_a_network)

    def small_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if not case.of_a_network)
