"""`fastcifar count`: the layers of a network as a table."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from fastcifar.config import ModelConfig
from fastcifar.models import check_parameters, find_architecture
from fastcifar.models.count import NetworkCount, count_network


def print_count(model: ModelConfig) -> None:
    """Prints a row for each layer with parameters, then the totals.

    Raises:
        ConfigError: as `build_model` does, or because the network has more parameters than `max_params`.
    """
    count = count_network(model.arch, **model.options)
    check_parameters(count.parameters, model.max_params)
    console = Console(highlight=False)
    console.print(layer_table(count))
    console.print(
        f"{model.arch}: {count.parameters:,} parameters; an image takes {count.forward_flops / 1e9:.4f} GFLOP forward, "
        f"{count.training_flops / 1e9:.4f} GFLOP in training (a multiplication and an addition are two), and keeps "
        f"{count.activation_bytes / 1e6:.3f} MB of activations for the backward pass (in bfloat16, uncompiled).\n"
        f"It is {find_architecture(model.arch).summary}.",
        markup=False,
    )


def layer_table(count: NetworkCount) -> Table:
    """A row for each layer, and after those of a stage one with their sums."""
    table = Table("layer", "kind", "output", box=None)
    for title in ("parameters", "forward MFLOP"):
        table.add_column(title, justify="right")
    for stage, members in groupby(count.layers, lambda layer: layer.name.partition(".")[0]):
        layers = list(members)
        for layer in layers:
            output = "x".join(map(str, layer.output))
            table.add_row(layer.name, layer.kind, output, f"{layer.parameters:,}", f"{layer.flops / 1e6:,.2f}")
        if len(layers) > 1:
            sums = sum(layer.parameters for layer in layers), sum(layer.flops for layer in layers) / 1e6
            table.add_row(stage, "sum", "", f"{sums[0]:,}", f"{sums[1]:,.2f}", style="bold")
    return table
