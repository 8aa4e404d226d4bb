"""The model card: what a stranger must know about an exported network, in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastcifar.config import RunConfig
from fastcifar.data.sources import is_path
from fastcifar.inference.check import Check
from fastcifar.inference.formats import Format, module_beside
from fastcifar.inference.metrics import wilson_interval
from fastcifar.models import GIVEN
from fastcifar.output import printable
from fastcifar.runs.checkpoint import SNAPSHOT, WEIGHTS
from fastcifar.runs.console import percent
from fastcifar.runs.ensembles import is_ensemble, read_report
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork

ACTIVE = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What has a meaning within a line of Markdown or HTML; an underscore has none within a word."""

CARD = """# {title}

{what}, exported with torch {torch}.

- Input `images`: uint8 (N, {size}, {size}, 3), RGB, any N; the normalisation is part of the network.
- Output: probabilities, float32 (N, {count}), of the classes in this order: {classes}.
- Checked after writing on {checked}: the largest difference to {original} in fp32 was {difference:.1e}.
- It knows these classes alone, and gives any other image to one of them.

## How to load it

```python
{usage}
```

It needs no fastcifar.{note}
{members}
## Data and recipe

{recipe}

## Numbers

{numbers}
"""

MEMBERS = """
## Members

The probabilities are the mean of those of these networks, each with its own normalisation:

| run | weights | architecture | parameters |
|-|-|-|-|
{rows}
"""


def card(
    path: Path,
    networks: Sequence[TrainedNetwork],
    configs: Sequence[RunConfig],
    exported: Format,
    file: Path,
    check: Check,
) -> str:
    """Writes the card of the `file` that holds `networks`, of runs with `configs`, of the run or ensemble at `path`."""
    first, several = networks[0], len(networks) > 1
    dataset, archs = dataset_name(configs[0]), ", ".join(dict.fromkeys(map(arch_name, networks)))
    total = sum(map(parameters_of, networks))
    plain = f" The network is {module_beside(file).name}, plain PyTorch." if exported.suffix == ".safetensors" else ""
    return CARD.format(
        title=escaped(f"{f'Ensemble of {len(networks)}' if several else configs[0].recipe or archs} on {dataset}"),
        what=(
            f"{len(networks)} networks ({escaped(archs)}) in one, {total:,} parameters together, of runs of fastcifar"
            if several
            else f"{escaped(archs)}, {total:,} parameters, the {weights_name(first.weights)} of a run of fastcifar"
        ),
        torch=torch.__version__,
        size=first.image_size,
        count=len(first.classes),
        classes=", ".join(map(escaped, first.classes)),
        checked=escaped(str(check)),
        original="the mean of the trained networks" if several else "the trained network",
        difference=check.difference,
        usage=exported.usage.format(file=file.name, module=module_beside(file).stem),
        note=plain,
        members=MEMBERS.format(rows="\n".join(map(member_row, networks))) if several else "",
        recipe=table(together([recipe_of(config) for config in configs])),
        numbers=table(numbers_of(path, networks, check)) or "The run has not ended, and was not evaluated.",
    )


def member_row(network: TrainedNetwork) -> str:
    cells = network.path.name, network.weights, arch_name(network), f"{parameters_of(network):,}"
    return f"| {' | '.join(map(escaped, cells))} |"


def parameters_of(network: TrainedNetwork) -> int:
    return sum(parameter.numel() for parameter in network.model.parameters())


def arch_name(network: TrainedNetwork) -> str:
    return "a network given in Python" if network.arch == GIVEN else network.arch


def weights_name(name: str) -> str:
    if SNAPSHOT.fullmatch(name):
        return f"weights {name}"
    return "last weights" if name == WEIGHTS else f"average {name} of the weights"


def dataset_name(config: RunConfig) -> str:
    """Returns the name of the data set, or the last part of its path."""
    name = config.data.dataset
    if name == GIVEN:
        return "images given in Python"
    return Path(name).name if is_path(name) else name


def recipe_of(config: RunConfig) -> dict[str, Any]:
    optim, loss = config.optim.resolved, config.loss.resolved
    return {
        "data set": dataset_name(config),
        "validation images": config.data.val_split,
        "augmentation": config.data.augment,
        "architecture": json.dumps({"arch": config.model.arch, **config.model.options}),
        "optimiser": optim.optimizer,
        "peak learning rate": config.optim.peak_lr(config.batch_size),
        "weight decay": optim.weight_decay,
        "sharpness": None if optim.sharpness == "none" else optim.sharpness,
        "schedule": config.schedule.schedule,
        "loss": loss.loss,
        "label smoothing": loss.label_smoothing,
        "epochs": config.epochs,
        "batch size": config.batch_size,
        "seed": config.seed,
        "precision": config.engine.precision,
        "watched the test set": config.watch_test or None,
    }


def together(recipes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges the recipes of several runs; where they differ in a value, all of its values are listed."""
    values = {name: list(dict.fromkeys(recipe[name] for recipe in recipes)) for name in recipes[0]}
    return {name: found[0] if len(found) == 1 else ", ".join(map(str, found)) for name, found in values.items()}


def numbers_of(path: Path, networks: Sequence[TrainedNetwork], check: Check) -> dict[str, Any]:
    """Collects the file's own score, and what the run or the vote measured of the exported weights."""
    numbers: dict[str, Any] = {}
    if score := check.score:
        numbers["test accuracy of this file, in fp32"] = percent(score.correct / score.images)
        numbers["95% interval"] = " to ".join(map(percent, wilson_interval(score.correct, score.images)))
        if score.precision:
            what = f"test images that fastcifar classifies differently in {score.precision}"
            numbers[what] = f"{score.differing:,} of {score.images:,}"
    return numbers | (votes_of(path) if is_ensemble(path) else result_of(path, networks[0].weights))


def result_of(path: Path, weights: str) -> dict[str, Any]:
    """Returns the numbers of the run at `path`; none where it has not ended."""
    run = Run.open(path)
    result = run.result()
    if result is None:
        return {}
    own = result.test_accuracy if weights == WEIGHTS else result.averaged_test_accuracies.get(weights)
    return {
        f"test accuracy measured in training, in {run.config().engine.precision}": percent(own),
        "seconds of training": round(result.seconds),
        "trained on": result.device,
    }


def votes_of(path: Path) -> dict[str, Any]:
    """Returns the numbers of the ensemble at `path`; none where it was augmented, as the export is not."""
    report = read_report(path)
    if report.tta != "none":
        return {}
    return {
        "test accuracy of the vote": percent(report.best.soft_accuracy),
        "mean test accuracy of its members": percent(report.best.mean_member),
    }


def escaped(text: str) -> str:
    """Writes text from files such that Markdown and HTML find nothing in it to act on, and it stays on one line."""
    return ACTIVE.sub(r"\\\g<0>", printable(text))


def table(rows: dict[str, Any]) -> str:
    filled = [f"| {name} | {escaped(str(value))} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|-|-|", *filled]) if filled else ""
