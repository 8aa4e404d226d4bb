"""The model card: what a stranger must know about an exported network, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcifar.config import RunConfig
from fastcifar.data.sources import is_path
from fastcifar.errors import FastcifarError
from fastcifar.inference.evaluate import ENSEMBLE, FOLDER, names_of
from fastcifar.inference.formats import Format, module_beside
from fastcifar.inference.report import Report
from fastcifar.models import GIVEN
from fastcifar.runs.checkpoint import SNAPSHOT, WEIGHTS
from fastcifar.runs.console import percent
from fastcifar.runs.ensembles import is_ensemble, read_report
from fastcifar.runs.files import read_json
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork

CARD = """# {title}

{what}, exported with torch {torch}.

- Input `images`: uint8 (N, {size}, {size}, 3), RGB, any N; the normalisation is part of the network.
- Output: probabilities, float32 (N, {count}), of the classes in this order: {classes}.
- Checked after writing on {checked}: the largest difference to {original} in float32 was {difference:.1e}.
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


@dataclass(frozen=True)
class Check:
    """How an exported file was compared with the trained networks, in float32."""

    images: int
    dataset: str
    at_hand: bool
    """Whether the images are the first ones of the data set's test set, and not random."""
    difference: float
    """Largest difference of a probability from the trained network's, or from the mean of several networks."""

    def __str__(self) -> str:
        if self.at_hand:
            return f"the first {self.images} test images of {self.dataset}"
        return f"{self.images} random images, since {self.dataset} was not at hand"


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
        title=f"{f'Ensemble of {len(networks)}' if several else configs[0].recipe or archs} on {dataset}",
        what=(
            f"{len(networks)} networks ({archs}) in one, {total:,} parameters together, of runs of fastcifar"
            if several
            else f"{archs}, {total:,} parameters, the {weights_name(first.weights)} of a run of fastcifar"
        ),
        torch=torch.__version__,
        size=first.image_size,
        count=len(first.classes),
        classes=", ".join(first.classes),
        checked=check,
        original="the mean of the trained networks" if several else "the trained network",
        difference=check.difference,
        usage=exported.usage.format(file=file.name, module=module_beside(file).stem),
        note=plain,
        members=MEMBERS.format(rows="\n".join(map(member_row, networks))) if several else "",
        recipe=table(together([recipe_of(config) for config in configs])),
        numbers=table(numbers_of(path, networks)) or "The run has not ended, and was not evaluated.",
    )


def member_row(network: TrainedNetwork) -> str:
    return f"| {network.path.name} | {network.weights} | {arch_name(network)} | {parameters_of(network):,} |"


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


def numbers_of(path: Path, networks: Sequence[TrainedNetwork]) -> dict[str, Any]:
    """Collects what the run or vote, and `fastcifar eval`, measured of the exported weights."""
    ensemble = is_ensemble(path)
    numbers = votes_of(path) if ensemble else result_of(path, networks[0].weights)
    name = ENSEMBLE if ensemble else networks[0].weights
    with suppress(FastcifarError):  # a card goes without an evaluation that is missing, damaged or another version's
        report: Report = read_json(path / FOLDER / "evaluation.json", Report, "evaluate the run again")
        same = report.weights.keys() == {*names_of(path, networks), ENSEMBLE} if ensemble else name in report.weights
        if same:
            score = report.weights[name]
            numbers["test accuracy"] = percent(score.accuracy)
            numbers["95% interval"] = " to ".join(map(percent, score.interval))
            if report.chosen == name:
                numbers["expected calibration error"] = percent(report.calibration.error)
    return numbers


def result_of(path: Path, weights: str) -> dict[str, Any]:
    """Returns the numbers of the run at `path`; none where it has not ended."""
    result = Run.open(path).result()
    if result is None:
        return {}
    own = result.test_accuracy if weights == WEIGHTS else result.averaged_test_accuracies.get(weights)
    numbers = {"test accuracy": percent(own), "seconds of training": round(result.seconds)}
    return numbers | {"trained on": result.device}


def votes_of(path: Path) -> dict[str, Any]:
    """Returns the numbers of the ensemble at `path`; none where it was augmented, as the export is not."""
    report = read_report(path)
    if report.tta != "none":
        return {}
    best = report.best
    return {
        "test accuracy": percent(best.soft_accuracy),
        "95% interval": " to ".join(map(percent, best.soft_interval)),
        "mean test accuracy of its members": percent(best.mean_member),
    }


def table(rows: dict[str, Any]) -> str:
    filled = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|-|-|", *filled]) if filled else ""
