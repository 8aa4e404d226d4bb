"""Augmentation: `policy` says what is done, `random` and `sampling` draw when and how much, appliers do it.

This module is free of torch.

Every applier carries out the same `sampling.Params` over a data set that lives on the device:

    applier = resolve_name(BACKENDS[name])(images, policy, normalization, dtype, chunk_size)
    applier.submit(index, params)           # starts on a chunk: int64 (N,) and its parameters, on the CPU
    batch = applier.collect()               # the chunk submitted last: (N, 3, H, W) in channels_last, in memory of its
    own
"""

from __future__ import annotations

from fastcifar.errors import ConfigError, unknown

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation by channel, as fractions of 255."""

BACKENDS: dict[str, str] = {
    "torch": "fastcifar.augment.torch_apply:TorchApplier",
    "dali": "fastcifar.augment.dali_apply:DaliApplier",
    "triton": "fastcifar.augment.torch_apply:TritonApplier",
}

NORMALIZATIONS: dict[str, Statistics | None] = {
    "true": None,
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""The presets by name; `true` stands for the data set's own statistics.

`kuangliu` is that of reports 3 and 4: its deviations are those of single images, averaged.
`none` only scales to [0, 1]."""


def normalization(name: str, own: Statistics) -> Statistics:
    """The preset `name` for a data set with the statistics `own`. Raises ConfigError where the name is unknown."""
    if name not in NORMALIZATIONS:
        raise ConfigError(unknown("normalisation", name, NORMALIZATIONS))
    return NORMALIZATIONS[name] or own
