"""The one-pass applier: gather, warp, greyscale, erasing, normalisation and layout in a single kernel."""

from __future__ import annotations

from fastcifar.augment.torch_apply import TorchApplier
from fastcifar.kernels.augment import augment


class TritonApplier(TorchApplier):
    """As `TorchApplier`, with the Triton kernel on a GPU; elsewhere the kernel's reference runs, which is what
    `TorchApplier` does.

    An automatic policy stands between the warp and the rest, so with one there are two passes, and its groups between
    them.
    """

    function = staticmethod(augment)
