"""`fastcifar count`: a network's layers as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fastcifar.models.count import count_network


def print_count(arch: str, options: dict[str, Any]) -> None:
    """Prints a row for each layer with parameters, then the sums; raises ConfigError as `build_model` does."""
    count = count_network(arch, **options)
    table = Table("layer", "kind", "output", box=None)
    for title in ("parameters", "forward MFLOP"):
        table.add_column(title, justify="right")
    for layer in count.layers:
        table.add_row(layer.name, layer.kind, "x".join(map(str, layer.output)), f"{layer.parameters:,}", f"{layer.flops / 1e6:,.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{arch}: {count.parameters:,} parameters; an image takes {count.forward_flops / 1e9:.4f} GFLOP forward, "
        f"{count.training_flops / 1e9:.4f} GFLOP in training (a multiplication and an addition are two)."
    )
