"""The state of a run: what is kept along the way, and resuming from a checkpoint to the same bits."""

import copy
from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, DROPOUT, METHODS, assert_same_weights, image_set, run

from fastcifar.config import OptimConfig, ScheduleConfig
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import FastcifarError


@pytest.mark.parametrize(
    ("method", "stop_after"), [("averages", 1), ("snapshots", 6), *((method, 9) for method in METHODS)]
)
def test_going_on_from_any_batch_gives_the_same_bits(method, stop_after):
    config = replace(DROPOUT, **METHODS[method])
    whole, first, second = (Trainer(config, image_set(100), image_set(20, 1)) for _ in range(3))
    run(whole)
    run(first, stop_after)
    second.state.restore(first.state.checkpoint())
    assert second.state.steps_done == stop_after
    run(second)
    expected, found = (trainer.state.checkpoint().files() for trainer in (whole, second))
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert all(torch.equal(tensor, found[file][name]) for name, tensor in tensors.items()), file
    assert whole.state.lr[-1] == second.state.lr[-1]


@pytest.mark.usefixtures("card", "deterministic")
def test_a_gpu_goes_on_to_the_same_bits_with_a_scaled_loss():
    config = replace(CONFIG, engine=replace(CONFIG.engine, device="cuda:0", precision="fp16"))
    whole, first, second = (Trainer(config, image_set(100)) for _ in range(3))
    run(whole)
    run(first, stop_after=7)
    second.state.restore(first.state.checkpoint())
    assert_same_weights(whole, run(second))
    assert whole.read_totals().first_bad_step is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.progress.update(epoch=99), "progress does not fit"),
        (lambda c: c.progress.update(step=1), "progress does not fit"),
        (lambda c: c.progress.update(snapshots=["snapshot-1"]), "progress does not fit"),
        (lambda c: c.state.update(random=torch.zeros_like(c.state["random"]) + 255), "state is damaged"),
        (lambda c: c.state.pop("meter"), "the checkpoint's state lacks meter"),
        (lambda c: c.weights["weights"].pop("stem.weight"), "the checkpoint's weights lacks stem.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(damage, message):
    checkpoint = Trainer(CONFIG, image_set(40)).state.checkpoint()
    damage(checkpoint)
    with pytest.raises(FastcifarError, match=message):
        Trainer(CONFIG, image_set(40)).state.restore(checkpoint)


def test_what_runs_in_between_leaves_no_trace():
    trainer = run(Trainer(replace(DROPOUT, **METHODS["averages"]), image_set(100)), stop_after=7)
    before = copy.deepcopy(trainer.state.checkpoint().files())
    with trainer.state.unchanged():
        trainer.launch(*trainer.launch.blank_batch(20))
        assert not torch.equal(trainer.state.tensors()["random"], before["state"]["random"])
    for file, tensors in trainer.state.checkpoint().files().items():
        assert all(torch.equal(tensor, before[file][name]) for name, tensor in tensors.items()), file


def test_the_best_epoch_on_the_validation_split_is_kept():
    """The best epoch is kept for each kind of weights; no other split chooses."""
    trainer = Trainer(
        replace(CONFIG, epochs=6, optim=OptimConfig(lr=0.5)), image_set(40), image_set(15, 1), image_set(15, 2)
    )
    kept = {}
    while trainer.state.epoch < 6:
        record = run(trainer, stop_after=trainer.state.steps_done + 2).records[-1]
        assert record.test_loss == trainer.evaluate(trainer.watched, trainer.state.last())["weights"].loss
        kept[trainer.state.epoch] = (record, trainer.state.buckets.copies())
    best = trainer.state.best["weights"]
    accuracies = [record.validation_accuracy for record, _ in kept.values()]
    assert best.score["accuracy"] == max(accuracies)
    record, flat = kept[best.score["epoch"]]
    assert record.validation_loss == min(
        r.validation_loss for r, _ in kept.values() if r.validation_accuracy == max(accuracies)
    )
    assert all(torch.equal(a, b) for a, b in zip(best.flat, flat, strict=True))
    assert trainer.state.best.keys() == {"weights", "ema-0.999"}
    assert trainer.state.chosen()["weights"] is best.flat
    assert not Trainer(CONFIG, image_set(40), None, image_set(15, 2)).state.best


def test_snapshots_are_the_weights_at_the_end_of_each_cycle():
    """A cycle ends where the rate jumps up; the last of the 15 steps ends no cycle."""
    schedule = ScheduleConfig("warm-restarts", warmup="2st", restart_period="4st", snapshots=True)
    trainer = Trainer(replace(CONFIG, epochs=3, schedule=schedule), image_set(100))
    jumps = [step for step in range(3, 15) if trainer.state.lr[step] > trainer.state.lr[step - 1]]
    seen = {}

    def look(batch: int) -> None:
        if trainer.state.steps_done in jumps:
            seen[f"snapshot-{len(seen) + 1}"] = copy.deepcopy(trainer.model.state_dict())

    while trainer.state.epoch < 3:
        trainer.run_epoch(tick=look)
    assert jumps == [6, 10, 14]
    assert list(trainer.state.snapshots) == list(seen) == ["snapshot-1", "snapshot-2", "snapshot-3"]
    for name, kept in trainer.state.snapshots.items():
        assert all(torch.equal(tensor, seen[name][key]) for key, tensor in kept.items())
        assert kept.keys() == seen[name].keys()
    assert not torch.equal(seen["snapshot-1"]["stem.weight"], seen["snapshot-2"]["stem.weight"])


def test_a_plateau_lowers_the_rate_of_the_steps_to_come():
    schedule = ScheduleConfig("plateau", warmup="0%", patience=0, gamma=0.5)
    trainer = run(
        Trainer(
            replace(CONFIG, epochs=12, schedule=schedule, optim=OptimConfig(lr=0.3)), image_set(40), image_set(15, 1)
        )
    )
    plain = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, factor=0.5, patience=0)
    for record in trainer.records:
        assert record.lr == plain.param_groups[0]["lr"]
        torchs.step(record.validation_loss)
    assert trainer.records[-1].lr < 0.3
