"""Whole runs through the command line: the folder, resuming after every kind of end, and the Python interface."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastcifar
from fastcifar import cli
from fastcifar.config import RunConfig
from fastcifar.data.sources import find, load_dataset
from fastcifar.diagnostics.plan import cost, outline
from fastcifar.engine.resolve import resolve
from fastcifar.engine.run import build_trainer
from fastcifar.engine.trainer import Trainer
from fastcifar.recipes.registry import derive
from fastcifar.runs.ensembles import read_report
from fastcifar.runs.folder import Run
from fastcifar.runs.network import read_network
from fastcifar.runs.records import read_records

FASTCIFAR = [sys.executable, "-m", "fastcifar.cli"]
IMAGES = Path(tempfile.gettempdir()) / f"fastcifar-{os.getpid()}.npz"
SMALL = f"""train --dataset {IMAGES} --arch resnet --blocks 1 --channels 16 --batch-size 50 --epochs 3
    --device cpu --compile off""".split()
RESULT_KEYS = set(
    """test_accuracy validation_accuracy averaged_test_accuracy averaged_test_accuracies chosen_epochs
    watched_test_accuracy images_per_second seconds seconds_by_phase
    flop_utilization peak_memory_bytes parameters recipe device versions commit""".split()
)


def weight_files(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module", autouse=True)
def images() -> Iterator[None]:
    """A quarter of the drawn images, as a data set of one's own."""
    arrays = {}
    for split, count in (("train", 2500), ("test", 500)):
        part = load_dataset("synthetic", split).subset(torch.arange(count))
        arrays |= {f"{split}_images": part.images.numpy(), f"{split}_labels": part.labels.numpy()}
    numpy.savez(IMAGES, **arrays)
    yield
    IMAGES.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was left alone."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    subprocess.run([*FASTCIFAR, *SMALL, "--val-split", "500", "--watch-test", "--out", str(run)], check=True)
    return run


def test_result(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == RESULT_KEYS
    assert set(result["seconds_by_phase"]) == {"data", "compile", "train", "evaluate"}
    assert 0 < sum(result["seconds_by_phase"].values()) <= result["seconds"]
    assert 0.3 < result["test_accuracy"] <= 1
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
    assert (config.engine.compile, config.engine.device) == ("off", "cpu")
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
    assert scalars["accuracy/test"][-1] == pytest.approx(
        json.loads((finished / "result.json").read_text())["test_accuracy"]
    )
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_gives_the_accuracy_of_the_result(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert cli.main(["eval", str(finished)]) == 0
    raw, averaged, *_ = capsys.readouterr().out.splitlines()
    assert f"{100 * result['test_accuracy']:.2f}%" in raw
    assert f"{100 * result['averaged_test_accuracy']:.2f}%" in averaged


def test_a_folder_in_use_is_refused_and_left_alone(finished, capsys):
    before = sorted(finished.iterdir())
    assert cli.main([*SMALL, "--out", str(finished)]) == 2
    assert f"{finished} exists already" in capsys.readouterr().err
    assert sorted(finished.iterdir()) == before


def test_resuming_a_finished_run_changes_nothing(finished):
    before = weight_files(finished)
    assert fastcifar.resume(finished).seconds == json.loads((finished / "result.json").read_text())["seconds"]
    assert weight_files(finished) == before


def interrupt(run: Path, number: signal.Signals, options: list[str]) -> subprocess.CompletedProcess[str]:
    """Starts a run and sends `number` in the middle of its second epoch."""
    process = subprocess.Popen([*FASTCIFAR, *SMALL, *options, "--out", str(run)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=errors)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_interrupted_and_resumed_ends_in_the_same_bytes(tmp_path, finished_with_dropout, number):
    run = tmp_path / "run"
    ended = interrupt(run, number, DROPOUT)
    assert not (run / "result.json").exists()
    if number == signal.SIGKILL:
        assert ended.returncode == -number
    else:
        assert ended.returncode == 128 + number
        assert ended.stderr.strip().endswith(f"go on with: fastcifar train --resume {run}")
        assert "Traceback" not in ended.stderr
    subprocess.run([*FASTCIFAR, "train", "--resume", str(run)], check=True)
    assert weight_files(run) == weight_files(finished_with_dropout)
    assert [record.epoch for record in read_records(run / "metrics.jsonl")] == [1, 2, 3]
    losses = [
        [record.train_loss for record in read_records(folder / "metrics.jsonl")]
        for folder in (run, finished_with_dropout)
    ]
    assert losses[0] == losses[1]


DROPOUT = ["--dropout", "0.2", *"--schedule warm-restarts --restart-period 1ep --warmup 0% --snapshots".split()]
"""The random state counts, and there are weights of three cycles."""


@pytest.fixture(scope="module")
def finished_with_dropout(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dropout"
    subprocess.run([*FASTCIFAR, *SMALL, *DROPOUT, "--out", str(run)], check=True)
    return run


def test_the_snapshots_of_a_run_vote_and_teach(finished_with_dropout, tmp_path, capsys):
    assert {name for name in weight_files(finished_with_dropout) if name.startswith("snapshot")} == {
        f"snapshot-{number}.safetensors" for number in (1, 2, 3)
    }
    together = tmp_path / "together"
    assert cli.main(["ensemble", str(finished_with_dropout), "--out", str(together)]) == 0
    assert [member.weights for member in read_report(together).members] == ["snapshot-1", "snapshot-2", "snapshot-3"]
    taught = ["--teacher", str(together), "--epochs", "1", "--batch-size", "500", "--out", str(tmp_path / "student")]
    assert cli.main([*SMALL, *taught]) == 0
    teacher = Trainer(Run.open(tmp_path / "student").config(), load_dataset(str(IMAGES), "train")).objective.teacher
    for (network, _), name in zip(teacher.members, ("snapshot-1", "snapshot-2", "snapshot-3"), strict=True):
        expected = read_network(finished_with_dropout).load(torch.device("cpu"), name).model.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"split_seed": 1}], ids=str)
def test_the_validation_split_is_drawn_by_its_own_seed(changes):
    """So that the members of an ensemble have one to choose by."""
    config = resolve(cli.parse([*SMALL, "--val-split", "500"]).run)[0]
    first, second = (build_trainer(one, 0.0).validation.images for one in (config, derive(config, **changes)))
    assert torch.equal(first, second) == ("seed" in changes)


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_ends_in_the_same_bytes(tmp_path):
    options = ["--compile", "on", "--epochs", "4"]
    subprocess.run([*FASTCIFAR, *SMALL, *options, "--out", str(tmp_path / "whole")], check=True)
    interrupt(tmp_path / "killed", signal.SIGKILL, options)
    subprocess.run([*FASTCIFAR, "train", "--resume", str(tmp_path / "killed")], check=True)
    assert Run.open(tmp_path / "killed").config().engine.compile == "on"
    assert weight_files(tmp_path / "killed") == weight_files(tmp_path / "whole")


def test_a_diverging_run_says_so_and_keeps_the_folder_readable(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main([*SMALL, "--lr", "1e25", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcifar: the loss became infinite or NaN at step")
    assert "lower --lr" in error
    assert not (run / "checkpoints").exists()


def test_python_interface(tmp_path):
    config = cli.parse(SMALL).run
    result = fastcifar.train(replace(config, epochs=1), tmp_path / "run")
    assert {field.name for field in fields(result)} == RESULT_KEYS
    assert result.parameters == sum(
        p.numel() for p in fastcifar.build_model("resnet", **config.model.options).parameters()
    )
    assert isinstance(fastcifar.recipe("quickstart"), RunConfig)
    assert set(fastcifar.__all__) == set(dir(fastcifar))


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """CIFAR-10 where it is at hand, else the drawn images."""
    dataset, expected = ("cifar10", 0.65) if find("cifar10") else ("synthetic", 0.95)
    command = [*FASTCIFAR, "train", "--recipe", "quickstart", "--dataset", dataset, "--out", str(tmp_path / "run")]
    subprocess.run(
        command, check=True, env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    )
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] >= expected
