"""The networks that are timed, by name, those with a target first; free of torch."""

from __future__ import annotations

from fastcifar.config import ModelConfig
from fastcifar.models import ARCHITECTURES
from fastcifar.recipes import RECIPES

FIRST = ("resnet20_v2", "resnet_prop", "resnet_s4", "resnetrs50", "resnet18", "resnet_s3", "wrn28_10")
GENERIC = ("resnet", "wrn")
"""Those that are others by other names, where nothing more is said."""
NETWORKS = {name: ModelConfig(name) for name in (*FIRST, *ARCHITECTURES) if name not in GENERIC}
NETWORKS["resnetrs50"] = RECIPES["r2_stem128"].config.model
