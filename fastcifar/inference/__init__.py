"""Answers from trained runs; the names below are free of torch."""

from typing import Literal

TTA = Literal["none", "mirror", "mirror-shift"]
"""Test-time augmentation; see `inference.classifier`."""

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
"""What networks compute in; "auto" is what they were trained in."""

LabelForm = Literal["name", "index"]
"""How a table gives a class: by its name, or by its number, from 0 up."""

ExportFormat = Literal["safetensors", "torch", "onnx"]
"""What a network is exported to; see `inference.export`."""
