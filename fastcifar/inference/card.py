"""The model card: what a stranger must know of an exported network, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastcifar.config import RunConfig
from fastcifar.data.sources import is_path
from fastcifar.inference.evaluate import FOLDER
from fastcifar.inference.formats import Format, Metadata, module_beside
from fastcifar.runs.folder import Run

CARD = """# {title}

{arch}, {parameters:,} parameters, the {weights} of a run of fastcifar, exported with torch {torch}.

- Input `images`: uint8 (N, {size}, {size}, 3), RGB, any N; the normalisation is part of the network.
- Output: probabilities, float32 (N, {count}), of the classes in this order: {classes}.
- Checked after writing on {checked}: the largest difference to the trained network in float32 was {difference:.1e}.
- It knows these classes alone, and gives any other image to one of them.

## How to load it

```python
{usage}
```

It needs no fastcifar.{note}

## Data and recipe

{recipe}

## Numbers

{numbers}
"""


def card(run: Run, exported: Format, metadata: Metadata, file: Path, parameters: int, checked: str, difference: float) -> str:
    """The card of `file`, an export of `run`; `checked` says on what it was compared, and with what `difference` of probabilities."""
    config = run.config()
    plain = f" The network is {module_beside(file).name}, plain PyTorch." if exported.suffix == ".safetensors" else ""
    return CARD.format(
        title=f"{config.recipe or metadata['arch']} on {metadata['dataset']}",
        arch=metadata["arch"],
        parameters=parameters,
        weights="last weights" if metadata["weights"] == "weights" else f"average {metadata['weights']} of the weights",
        torch=torch.__version__,
        size=metadata["image_size"],
        count=len(metadata["classes"]),
        classes=", ".join(metadata["classes"]),
        checked=checked,
        difference=difference,
        usage=exported.usage.format(file=file.name, module=module_beside(file).stem),
        note=plain,
        recipe=table(recipe_of(config)),
        numbers=table(numbers_of(run, metadata["weights"])) or "The run has not ended, and was not evaluated.",
    )


def dataset_name(config: RunConfig) -> str:
    """The name of the data set; of a path, its last part."""
    name = config.data.dataset
    return Path(name).name if is_path(name) else name


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """What tells one training from another."""
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


def numbers_of(run: Run, weights: str) -> dict[str, Any]:
    """What was measured of the exported weights: at the end of the run, and by `fastcifar eval` where that was asked."""
    result, evaluation = run.result(), run.path / FOLDER / "evaluation.json"
    numbers: dict[str, Any] = {}
    if result:
        own = result.test_accuracy if weights == "weights" else result.averaged_test_accuracies.get(weights)
        numbers = {"test accuracy": share(own), "seconds of training": round(result.seconds), "trained on": result.device}
    if evaluation.is_file():
        try:
            found = json.loads(evaluation.read_text("utf-8"))
            score = found["weights"][weights]
            numbers["test accuracy"] = share(score["accuracy"])
            numbers["95% interval"] = " to ".join(share(bound) for bound in score["interval"])
            if found["chosen"] == weights:
                numbers["expected calibration error"] = share(found["calibration"]["error"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return numbers  # a card goes without an evaluation that is damaged or older than the run
    return numbers


def share(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.2f}%"


def table(rows: dict[str, Any]) -> str:
    """A Markdown table of what is not None; nothing for no rows."""
    filled = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|-|-|", *filled]) if filled else ""
