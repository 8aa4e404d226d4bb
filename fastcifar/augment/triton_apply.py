"""The one-pass applier: gather, warp, greyscale, erasing, normalisation and layout in one kernel."""

from __future__ import annotations

from fastcifar.augment.torch_apply import TorchApplier
from fastcifar.kernels.augment import augment


class TritonApplier(TorchApplier):
    """As `TorchApplier`, with the Triton kernel on a GPU; elsewhere its reference runs.

    An automatic policy takes two passes, with its groups between them.
    """

    function = staticmethod(augment)
