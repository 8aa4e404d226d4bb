"""The precision ladder: bfloat16 where it is native, else float16 with a scaled loss on a GPU, else float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcifar.errors import ConfigError
from fastcifar.hardware import native_bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The type in which convolutions and matrix products are computed; weights and statistics stay float32."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def scaled(self) -> bool:
        """Whether gradients would underflow without a scaled loss."""
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which a model computes in this precision."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.name != "fp32")


def resolve_precision(requested: str, device: torch.device) -> tuple[Precision, str | None]:
    """The precision for `requested` on `device`, and one line where `auto` had to step down the ladder.

    Raises:
        ConfigError: a precision was asked for that the device does not have.
    """
    native = native_bf16(device)
    if requested == "auto":
        if native:
            return Precision("bf16"), None
        if device.type == "cuda":
            return Precision("fp16"), "This GPU has no native bfloat16: computing in float16 with a scaled loss."
        return Precision("fp32"), "This CPU has no native bfloat16: computing in float32."
    if requested == "bf16" and not native and device.type == "cuda":
        raise ConfigError("this GPU has no native bfloat16; choose --precision fp16 or auto.")
    if requested == "fp16" and device.type == "cpu":
        raise ConfigError("float16 training needs a GPU; choose --precision bf16, fp32 or auto.")
    return Precision(requested), None
