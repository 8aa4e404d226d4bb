"""`fastcifar count`: the layers of a network as a table."""

from __future__ import annotations

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
    table = Table("layer", "kind", "output", box=None)
    for title in ("parameters", "forward MFLOP"):
        table.add_column(title, justify="right")
    for layer in count.layers:
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.output)),
            f"{layer.parameters:,}",
            f"{layer.flops / 1e6:,.2f}",
        )
    return table
