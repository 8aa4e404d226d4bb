"""Whole runs within this process: more epochs for a run, signals while compiling, pictures that fail."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from small_training import CONFIG, image_set

from fastcifar.config import AverageConfig, RunConfig, ScheduleConfig
from fastcifar.engine import run as module
from fastcifar.engine.run import lengthened, resume, train
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.optim.schedules import lr_table
from fastcifar.runs.console import Silence
from fastcifar.runs.folder import Run
from fastcifar.runs.interrupt import Interrupted
from fastcifar.runs.network import read_network
from fastcifar.runs.records import read_records


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without what takes most of the time of runs so short, and is tested elsewhere."""
    monkeypatch.setattr(module, "plot_run", lambda run: Figure())
    monkeypatch.setattr(module, "matmul_flops_per_second", lambda device, dtype: 1e12)


IMAGES = {"train_set": image_set(100), "test_set": image_set(40, seed=1)}
CONSTANT = replace(
    CONFIG, schedule=ScheduleConfig("constant", warmup="10%"), average=AverageConfig((0.9,), swa_start="50%")
)


class Heard(Silence):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str, *, prominent: bool = False) -> None:
        self.notes.append(text)


def weights(run: Path, name: str) -> bytes:
    return (
        Run(run)
        .checkpoints.joinpath(Run(run).checkpoints.joinpath("latest").read_text().strip(), f"{name}.safetensors")
        .read_bytes()
    )


def test_a_finished_run_that_is_made_longer_equals_one_that_was_that_long(tmp_path):
    """Where the schedule does not depend on the length: the warm-up and the start of SWA stay where they were."""
    train(CONSTANT, tmp_path / "run", **IMAGES)
    resume(tmp_path / "run", epochs=4, **IMAGES)
    straight = replace(CONSTANT, epochs=4, schedule=replace(CONSTANT.schedule, warmup="1st"))
    train(replace(straight, average=AverageConfig((0.9,), swa_start="5st")), tmp_path / "straight", **IMAGES)
    for name in ("weights", "ema-0.9", "swa"):
        assert weights(tmp_path / "run", name) == weights(tmp_path / "straight", name)
    assert [record.epoch for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    results = {file.name: json.loads(file.read_text()) for file in (tmp_path / "run").glob("result*.json")}
    assert results.keys() == {"result.json", "result-2-epochs.json"}
    assert results["result.json"]["seconds"] > results["result-2-epochs.json"]["seconds"]
    assert Run.open(tmp_path / "run").config().epochs == 4


def test_what_more_epochs_do_to_the_rate_is_said(tmp_path):
    train(CONFIG, tmp_path / "run", **IMAGES)
    console = Heard()
    resume(tmp_path / "run", epochs=4, console=console, **IMAGES)
    schedule = replace(CONFIG.schedule, warmup="1st")
    rate, last = lr_table(schedule, 0.1, 5, 4)[10], lr_table(CONFIG.schedule, 0.1, 5, 2)[9]
    (said,) = [note for note in console.notes if "in place of" in note]
    assert said == (
        "4 epochs in place of 2: cosine is laid out for all of them, so the learning rate goes on at "
        f"{rate:.4g}, where it had come to {last:.4g}."
    )
    assert read_records(tmp_path / "run" / "metrics.jsonl")[2].lr == lr_table(schedule, 0.1, 5, 4)[14]


@pytest.mark.parametrize("epochs", [1, 2])
def test_fewer_epochs_are_refused_and_the_run_stays(tmp_path, epochs):
    train(CONFIG, tmp_path / "run", **IMAGES)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is a run of 2 epochs; give more with --epochs"):
        resume(tmp_path / "run", epochs=epochs, **IMAGES)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


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


def test_a_signal_while_compiling_stops_at_once_and_the_run_can_go_on(tmp_path, monkeypatch):
    def endless(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    with monkeypatch.context() as patched:
        patched.setattr("fastcifar.engine.trainer.obstacle_to_compiling", endless)
        with pytest.raises(Interrupted) as stopped:
            train(CONFIG, tmp_path / "run", **IMAGES)
    assert stopped.value.signal_number == signal.SIGTERM
    assert f"go on with: fastcifar train --resume {tmp_path / 'run'}" in str(stopped.value)
    assert resume(tmp_path / "run", **IMAGES).test_accuracy > 0


def test_the_result_is_written_before_the_picture_and_outlives_its_failure(tmp_path, monkeypatch):
    def failing(run):
        assert run.result() is not None
        raise ValueError("no such backend")

    monkeypatch.setattr(module, "plot_run", failing)
    console = Heard()
    assert train(CONFIG, tmp_path / "run", console=console, **IMAGES).test_accuracy > 0
    assert "curves.png was not drawn (no such backend)." in console.notes
    assert not (tmp_path / "run" / "curves.png").exists()


def test_two_sets_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give both or none"):
        train(CONFIG, tmp_path / "run", train_set=IMAGES["train_set"])
    other = replace(IMAGES["test_set"], classes=tuple("vwxyz"))
    with pytest.raises(ConfigError, match="differ in their classes"):
        train(CONFIG, tmp_path / "run", train_set=IMAGES["train_set"], test_set=other)
    assert not (tmp_path / "run").exists()


def test_a_run_on_given_images_must_be_given_them_again(tmp_path):
    train(CONFIG, tmp_path / "run", **IMAGES)
    with pytest.raises(FastcifarError, match="give them again in Python, as train_set= and test_set="):
        resume(tmp_path / "run", epochs=3)
    assert read_network(tmp_path / "run").load(torch.device("cpu")).classes == IMAGES["train_set"].classes
