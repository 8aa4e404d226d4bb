"""Whole runs: the folder, resuming after every kind of end, further epochs, and what is printed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy
import pytest
import torch
from made_run import record, weight_files
from matplotlib.figure import Figure
from small_training import CONFIG, DROPOUT, image_set
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcifar import cli
from fastcifar.config import AverageConfig, RunConfig, ScheduleConfig
from fastcifar.data.sources import find, load_dataset
from fastcifar.diagnostics.plan import cost, outline
from fastcifar.engine import run as module
from fastcifar.engine.compile import Obstacle, Why
from fastcifar.engine.run import NOT_CAPTURED, NOT_COMPILED, lengthened, resume, train
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.optim.schedules import lr_table
from fastcifar.runs.console import Silence
from fastcifar.runs.folder import Result, Run
from fastcifar.runs.interrupt import Interrupted
from fastcifar.runs.network import read_network
from fastcifar.runs.records import read_records

FASTCIFAR = [sys.executable, "-m", "fastcifar.cli"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Returns the flags of a run on a quarter of the drawn images, as a user's own data set."""
    arrays, path = {}, tmp_path_factory.mktemp("data") / "images.npz"
    for split, count in (("train", 2500), ("test", 500)):
        part = load_dataset("synthetic", split).subset(torch.arange(count))
        arrays |= {f"{split}_images": part.images.numpy(), f"{split}_labels": part.labels.numpy()}
    numpy.savez(path, **arrays)
    flags = "--arch resnet --blocks 1 --channels 16 --batch-size 50 --epochs 3 --device cpu --compile off"
    return ["train", "--dataset", str(path), *flags.split()]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    options = "--val-split 500 --watch-test --dropout 0.2 --snapshots --schedule warm-restarts --restart-period 1ep"
    subprocess.run([*FASTCIFAR, *small, *options.split(), "--warmup", "0%", "--out", str(run)], check=True)
    return run


def test_result(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == {field.name for field in fields(Result)}
    assert set(result["seconds_by_phase"]) == {"data", "compile", "train", "evaluate"}
    assert 0 < sum(result["seconds_by_phase"].values()) <= result["seconds"]
    assert 0.25 < result["test_accuracy"] <= 1
    assert 0 < result["averaged_test_accuracy"] <= 1
    assert 0 < result["validation_accuracy"] <= 1
    assert result["images_per_second"] > 0
    assert 0 < result["flop_utilization"] < 1
    assert result["versions"]["fastcifar"]


def test_the_memory_planned_is_an_upper_bound(finished, monkeypatch):
    monkeypatch.setattr("fastcifar.diagnostics.plan.REHEARSAL_SECONDS", 0.0)
    config = Run.open(finished).config()
    peak = json.loads((finished / "result.json").read_text())["peak_memory_bytes"]
    assert peak <= cost(config, outline(config)).memory.needed


def test_config_is_complete_and_loads_back(finished):
    config = Run.open(finished).config()
    assert config.data.loader == "torch"
    assert config.data.chunk_size is not None
    assert config.engine.precision in ("bf16", "fp32")
    assert (config.engine.compile, config.engine.capture, config.engine.device) == ("off", "off", "cpu")
    assert config.engine.threads >= 1
    assert cli.parse(["train", "--config", str(finished / "config.json")]).run == config


def test_metrics_events_and_curves_agree(finished):
    records = read_records(finished / "metrics.jsonl")
    assert [record.epoch for record in records] == [1, 2, 3]
    assert records[-1].train_loss < records[0].train_loss
    events = EventAccumulator(str(finished)).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["loss/train"] == pytest.approx([record.train_loss for record in records])
    assert scalars["accuracy/validation"] == pytest.approx([record.validation_accuracy for record in records])
    assert len(scalars["lr"]) == len(scalars["img_per_s"]) == 3
    result = json.loads((finished / "result.json").read_text())
    assert scalars["accuracy/test"][-1] == pytest.approx(result["test_accuracy"])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_gives_the_accuracy_of_the_result(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert cli.main(["eval", str(finished)]) == 0
    raw, averaged, *_ = capsys.readouterr().out.splitlines()
    assert f"{100 * result['test_accuracy']:.2f}%" in raw
    assert f"{100 * result['averaged_test_accuracy']:.2f}%" in averaged
    evaluated = json.loads((finished / "evaluation" / "evaluation.json").read_text())["weights"]["weights"]
    assert result["test_loss"] == pytest.approx(evaluated["loss"], rel=1e-3)


def test_a_finished_run_is_left_alone(finished, small, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert cli.main([*small, "--out", str(finished)]) == 2
    assert f"{finished} exists already" in capsys.readouterr().err
    assert resume(finished).seconds == json.loads((finished / "result.json").read_text())["seconds"]
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """Uses two epochs of CIFAR-10 where it is at hand, else five of the drawn images."""
    dataset, epochs, expected = ("cifar10", "2", 0.6) if find("cifar10") else ("synthetic", "5", 0.95)
    command = [*FASTCIFAR, "train", "--recipe", "quickstart", "--dataset", dataset, "--epochs", epochs]
    subprocess.run([*command, "--out", str(tmp_path / "run")], check=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] >= expected


IMAGES = {"train_set": image_set(100), "test_set": image_set(40, seed=1)}
CONSTANT = replace(
    CONFIG, schedule=ScheduleConfig("constant", warmup="10%"), average=AverageConfig((0.9,), swa_start="50%")
)


@pytest.fixture
def quick(monkeypatch):
    """Replaces what takes most of the time of runs so short, and is tested elsewhere."""
    monkeypatch.setattr(module, "plot_run", lambda run: Figure())
    monkeypatch.setattr(module, "matmul_flops_per_second", lambda device, dtype: 1e12)


class Heard(Silence):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str, *, prominent: bool = False) -> None:
        self.notes.append(text)


class Stopping(Silence):
    def tick(self, step: int, *others: object) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_in_the_same_bytes(tmp_path, compiled):
    config = replace(DROPOUT, engine=replace(DROPOUT.engine, compile=compiled))
    train(config, tmp_path / "whole", **IMAGES)
    with pytest.raises(Interrupted, match=f"go on with: fastcifar train --resume {tmp_path / 'run'}"):
        train(config, tmp_path / "run", console=Stopping(), **IMAGES)
    resume(tmp_path / "run", **IMAGES)
    assert Run.open(tmp_path / "run").config() == Run.open(tmp_path / "whole").config()
    assert weight_files(tmp_path / "run") == weight_files(tmp_path / "whole")


@pytest.mark.usefixtures("quick")
def test_a_signal_while_compiling_stops_at_once_and_the_run_can_go_on(tmp_path, monkeypatch):
    def endless(trainer, announce):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "compile", endless)
        with pytest.raises(Interrupted) as stopped:
            train(CONFIG, tmp_path / "run", **IMAGES)
    assert stopped.value.signal_number == signal.SIGTERM
    assert f"go on with: fastcifar train --resume {tmp_path / 'run'}" in str(stopped.value)
    assert resume(tmp_path / "run", **IMAGES).test_accuracy > 0


@pytest.mark.usefixtures("quick")
def test_a_finished_run_that_is_made_longer_equals_one_that_was_that_long(tmp_path):
    """The schedule must not depend on the length: the warm-up and the start of SWA stay where they were."""
    train(CONSTANT, tmp_path / "run", **IMAGES)
    resume(tmp_path / "run", epochs=4, **IMAGES)
    straight = replace(CONSTANT, epochs=4, schedule=replace(CONSTANT.schedule, warmup="1st"))
    train(replace(straight, average=AverageConfig((0.9,), swa_start="5st")), tmp_path / "straight", **IMAGES)
    ours, theirs = weight_files(tmp_path / "run"), weight_files(tmp_path / "straight")
    for name in ("weights", "ema-0.9", "swa"):
        assert ours[f"{name}.safetensors"] == theirs[f"{name}.safetensors"]
    assert [record.epoch for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    results = {file.name: json.loads(file.read_text()) for file in (tmp_path / "run").glob("result*.json")}
    assert results.keys() == {"result.json", "result-2-epochs.json"}
    assert results["result.json"]["seconds"] > results["result-2-epochs.json"]["seconds"]
    assert Run.open(tmp_path / "run").config().epochs == 4


@pytest.mark.usefixtures("quick")
def test_what_more_or_fewer_epochs_do_to_a_run_is_said(tmp_path):
    run = tmp_path / "run"
    train(CONFIG, run, **IMAGES)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is a run of 2 epochs; give more with --epochs"):
        resume(run, epochs=2, **IMAGES)
    with pytest.raises(FastcifarError, match="give them again there, as train_set= and test_set="):
        resume(run, epochs=3)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert read_network(run).load(torch.device("cpu")).classes == IMAGES["train_set"].classes
    console = Heard()
    resume(run, epochs=4, console=console, **IMAGES)
    schedule = replace(CONFIG.schedule, warmup="1st")
    rate, last = lr_table(schedule, 0.1, 5, 4)[10], lr_table(CONFIG.schedule, 0.1, 5, 2)[9]
    assert (
        "4 epochs in place of 2: cosine is laid out for all of them, so the learning rate goes on at "
        f"{rate:.4g}, where it had come to {last:.4g}."
    ) in console.notes
    assert read_records(run / "metrics.jsonl")[2].lr == lr_table(schedule, 0.1, 5, 4)[14]


@pytest.mark.usefixtures("quick")
def test_other_images_of_the_same_shape_are_refused(tmp_path):
    run, others = tmp_path / "run", image_set(100, seed=2)
    train(CONFIG, run, **IMAGES)
    for split in ("train", "test"):
        other = others if split == "train" else others.subset(torch.arange(40))
        with pytest.raises(FastcifarError, match=f"the {split} images are others than those of {run}; bring"):
            resume(run, epochs=3, **IMAGES | {f"{split}_set": other})
    assert resume(run, epochs=3, **IMAGES).test_accuracy > 0


@pytest.mark.usefixtures("quick")
def test_what_is_not_known_of_a_run_of_an_earlier_version_is_said(tmp_path):
    train(CONFIG, tmp_path / "run", **IMAGES)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "SHA256SUMS").unlink()
    progress = json.loads((checkpoint / "progress.json").read_text())
    del progress["images"]
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    for epochs in (3, 4):
        resume(tmp_path / "run", epochs=epochs, console=(console := Heard()), **IMAGES)
        assert any("without digests: damage to it, and other images" in note for note in console.notes)


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_renamed_during_training_is_one_sentence(tmp_path):
    class Renaming(Silence):
        def tick(self, step: int, *others: object) -> None:
            if step == 8:
                (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(FastcifarError, match="was removed or renamed while it was trained"):
        train(CONFIG, tmp_path / "run", console=Renaming(), **IMAGES)
    assert not (tmp_path / "run").exists()
    assert resume(tmp_path / "moved", **IMAGES).test_accuracy > 0


@pytest.mark.usefixtures("quick")
def test_what_kills_left_is_swept_as_a_run_is_resumed(tmp_path):
    train(CONFIG, run := tmp_path / "run", **IMAGES)
    (run / ".mine.partial").touch()
    before = set(run.rglob("*"))
    for name in ("checkpoints/00000005", "checkpoints/.00000007.partial"):
        (run / name).mkdir()
        (run / name / "weights.safetensors").touch()
    for name in (".metrics.jsonl.partial", ".config.json.partial", ".curves.png.partial"):
        (run / name).touch()
    resume(run)
    assert set(run.rglob("*")) == before


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig("step"),
        ScheduleConfig("multistep", warmup="3%"),
        ScheduleConfig("warm-restarts", restart_period="20%"),
        ScheduleConfig("swa", horizon="75%"),
        ScheduleConfig("step", per="epoch", step_size="35%", warmup="2ep"),
    ],
    ids=lambda schedule: f"{schedule.schedule} {schedule.per or ''}".strip(),
)
def test_the_rates_of_steps_that_are_done_stay_what_they_were(schedule):
    config = RunConfig(schedule=schedule, epochs=40)
    longer = lengthened(config, 60, 7, Path("run"))
    assert lr_table(longer.schedule, 0.1, 7, 60)[: 40 * 7] == pytest.approx(lr_table(schedule, 0.1, 7, 40))


@pytest.mark.usefixtures("quick")
def test_the_result_is_written_before_the_picture_and_outlives_its_failure(tmp_path, monkeypatch):
    def failing(run):
        assert run.result() is not None
        raise ValueError("no such backend")

    monkeypatch.setattr(module, "plot_run", failing)
    console = Heard()
    assert train(CONFIG, tmp_path / "run", console=console, **IMAGES).test_accuracy > 0
    assert "curves.png was not drawn (no such backend)." in console.notes
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.usefixtures("quick")
def test_a_diverging_run_says_so_and_saves_nothing(tmp_path):
    config = replace(CONFIG, optim=replace(CONFIG.optim, lr=1e25), schedule=ScheduleConfig(warmup="0%"))
    with pytest.raises(FastcifarError, match=r"NaN at step [1-4] of 10 \(epoch 1, lr .*e\+\d+\); lower --lr"):
        train(config, tmp_path / "run", **IMAGES)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("outcome", "line", "stored"),
    [
        (3.25, "Compiled in 3.2 s.", "on"),
        (Obstacle(Why.FAILED, "no compiler"), "Not compiled: torch.compile failed (no compiler); training", "off"),
        (Obstacle(Why.NO_STEP_LEFT), "Not compiled: no step is left to run.", "on"),
        (
            Obstacle(Why.DOES_NOT_PAY, training_seconds=9.6, compile_seconds=40.0),
            "Not compiled: 10 s of training would not win back the 40 s.",
            "off",
        ),
    ],
)
def test_what_came_of_compiling_is_said_and_stored(monkeypatch, outcome, line, stored):
    monkeypatch.setattr(Trainer, "compile", lambda trainer, announce: outcome)
    trainer, console = Trainer(replace(CONFIG, engine=replace(CONFIG.engine, compile="on")), image_set(40)), Heard()
    assert module.compile_and_capture(trainer, console).engine.compile == stored
    assert console.notes[0].startswith(line)
    assert NOT_COMPILED.keys() | NOT_CAPTURED.keys() == set(Why)


def test_the_highest_test_accuracy_is_the_weights_own():
    """An average, which reports 1 and 4 did not have, does not count."""
    epochs = [replace(record(1), test_accuracy=0.8), replace(record(2), test_accuracy=0.7)]
    assert module.highest_test_accuracy([replace(one, averaged_test_accuracies={"swa": 0.9}) for one in epochs]) == 0.8
    assert module.highest_test_accuracy([replace(one, test_accuracy=None) for one in epochs]) is None
