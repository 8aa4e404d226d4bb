"""The whole state of a training run: taken, and gone on from, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fastcifar.device import random_state_of, set_random_state
from fastcifar.errors import FastcifarError
from fastcifar.optim.averaging import Flat
from fastcifar.runs.checkpoint import Best, Checkpoint, Progress, copy_tensors, load_weights

if TYPE_CHECKING:
    from fastcifar.engine.trainer import Trainer


@dataclass(frozen=True)
class BestWeights:
    """The weights of the best epoch so far on the validation split."""

    score: Best
    flat: Flat


def state(trainer: Trainer) -> dict[str, Tensor]:
    """What training goes on from besides the weights: tensors of optimiser and meter, and a copy of the random
    state.
    """
    state = {"meter": trainer.meter.sums, "random": random_state_of(trainer.device)}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer.{key}.{name}"] = value
    return state


def named(trainer: Trainer, flat: Flat) -> dict[str, Tensor]:
    """A copy of the weights `flat` under the model's names."""
    with trainer.buckets.holding(flat):
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def take(trainer: Trainer) -> Checkpoint:
    """The state to go on from, to the bit."""
    progress: Progress = {
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "step": trainer.steps_done,
        "elapsed": trainer.elapsed,
        "seconds": dict(trainer.seconds),
        "scaler": trainer.scaler.state_dict(),
        "plateau": trainer.plateau.state() if trainer.plateau else {},
        "averages": list(trainer.averages.flat),
        "snapshots": list(trainer.snapshots),
        "best": {name: best.score for name, best in trainer.best.items()},
    }
    last = {name: named(trainer, flat) for name, flat in trainer.last().items()}
    best = {name: named(trainer, best.flat) for name, best in trainer.best.items()}
    return Checkpoint(last | trainer.snapshots, best, state(trainer), progress, trainer.network)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Goes on from `checkpoint`. Raises FastcifarError where it does not fit."""
    progress, own = checkpoint.progress, state(trainer)
    within = 0 <= progress["epoch"] <= trainer.config.epochs and 0 <= progress["batch"] < trainer.steps_per_epoch
    fits = progress["step"] == progress["epoch"] * trainer.steps_per_epoch + progress["batch"]
    kept, due = trainer.last().keys(), [name for end, name in trainer.cycle_ends.items() if end <= progress["step"]]
    same = (
        progress["snapshots"] == due and checkpoint.weights.keys() == kept | set(due) and checkpoint.best.keys() <= kept
    )
    if not (within and fits and same):
        raise FastcifarError(
            "the checkpoint's progress does not fit the run; give the configuration that it was made with."
        )
    for name, tensors in checkpoint.best.items():
        load_weights(trainer.model, tensors, f"the checkpoint's best {name}")
        trainer.best[name] = BestWeights(progress["best"][name], trainer.buckets.copies())
    for name, flat in reversed(
        trainer.last().items()
    ):  # the weights themselves, which are last to come, stay in the model
        load_weights(trainer.model, checkpoint.weights[name], f"the checkpoint's {name}")
        for target, origin in zip(flat, trainer.buckets.flat, strict=True):
            target.copy_(origin)
    trainer.snapshots = {name: checkpoint.weights[name] for name in due}
    copy_tensors(checkpoint.state, own, "the checkpoint's state")
    trainer.epoch, trainer.batch = progress["epoch"], progress["batch"]
    if trainer.book:
        trainer.book.turn_to(trainer.steps_done)
    try:
        set_random_state(trainer.device, own["random"])
        if trainer.precision.scaled:
            trainer.scaler.load_state_dict(progress["scaler"])
        if trainer.plateau:
            trainer.plateau.restore(progress["plateau"])
            trainer.scale_lr(trainer.plateau.factor)
    except (RuntimeError, KeyError) as error:
        raise FastcifarError(f"the checkpoint's state is damaged ({error}); start the run again.") from error
    trainer.earlier = progress["elapsed"]
    trainer.seconds.update(progress["seconds"])  # which adds them to those of this process
