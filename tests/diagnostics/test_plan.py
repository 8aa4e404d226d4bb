"""`fastcifar plan`: its table is the run's, its cost follows closed forms, and it remarks on mistakes only."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastcifar import cli
from fastcifar.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from fastcifar.data.sources import load_dataset
from fastcifar.diagnostics import doctor
from fastcifar.diagnostics.plan import SIZES, DataSize, cost, data_size, mistakes, outline
from fastcifar.engine.memory import passes_in_words, size
from fastcifar.engine.setup import build_trainer, resolve
from fastcifar.optim.schedules import lr_table

SMALL = RunConfig(
    model=ModelConfig("resnet", blocks=(1,), channels=(4,)),
    data=DataConfig("synthetic"),
    engine=EngineConfig(device="cpu", precision="fp32"),
    epochs=20,
    batch_size=64,
)


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch):
    monkeypatch.setattr("fastcifar.diagnostics.plan.REHEARSAL_SECONDS", 0.0)


def run(schedule: ScheduleConfig | None = None, optim: OptimConfig | None = None, epochs: int = 100) -> RunConfig:
    return RunConfig(schedule=schedule or ScheduleConfig(warmup="0%"), optim=optim or OptimConfig(), epochs=epochs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RunConfig(), []),
        (run(ScheduleConfig("polynomial", per="epoch", horizon="5ep", warmup="0%")), ["ends_early"]),
        (run(ScheduleConfig("cosine", horizon="99%")), ["ends_early"]),
        (run(ScheduleConfig("cosine", horizon="50%", periodic=True)), ["climbs_again"]),
        (run(ScheduleConfig("cosine", horizon="100ep")), []),
        (run(ScheduleConfig("one-cycle", per="epoch", horizon="25600ep"), epochs=200), ["cut_off", "slow_one_cycle"]),
        (run(ScheduleConfig("one-cycle")), []),
        (run(ScheduleConfig("cosine", per="epoch")), []),
        (run(ScheduleConfig("swa", horizon="75%")), []),
        (run(ScheduleConfig("swa", horizon="150%")), ["cut_off"]),
        (run(ScheduleConfig("warm-restarts")), []),
        (run(ScheduleConfig("warm-restarts", restart_period="50ep", warmup="0%")), []),
        (run(ScheduleConfig("warm-restarts", restart_period="30ep", warmup="0%")), ["partial_cycle"]),
        (run(ScheduleConfig("step", per="epoch", step_size="30ep")), []),
        (run(ScheduleConfig("multistep")), []),
        (run(ScheduleConfig("plateau")), []),
        (run(optim=OptimConfig("adam", lr=0.1)), ["lr_high"]),
        (run(optim=OptimConfig("sgd", lr=1.0)), []),
        (run(optim=OptimConfig("sgd", lr=1.01)), ["lr_high"]),
        (run(optim=OptimConfig("sgd", lr=0.01)), []),
        (run(optim=OptimConfig("sgd", lr=0.0099)), ["lr_low"]),
        (replace(run(optim=OptimConfig("sgd", scale_lr="linear")), batch_size=4096), []),
        (replace(SMALL, model=ModelConfig("resnet_prop", weight_init="he")), []),
        (replace(SMALL, model=ModelConfig("resnet_prop", weight_init="he", final_norm=False)), ["no_final_norm"]),
        (replace(SMALL, model=ModelConfig("resnet_prop", final_norm=False)), ["no_final_norm"]),
        (replace(SMALL, model=ModelConfig("resnet20_v2")), []),
        (replace(SMALL, model=ModelConfig("resnet20_v2", weight_init="he")), ["no_final_norm"]),
        (replace(SMALL, model=ModelConfig("resnet", pre_activation=True)), ["no_final_norm"]),
        (replace(SMALL, model=ModelConfig("wrn28_2")), []),
    ],
    ids=lambda value: f"{value.schedule.schedule}-{value.model.arch}" if isinstance(value, RunConfig) else None,
)
def test_mistakes_are_found_where_they_are_made_and_nowhere_else(config, expected):
    found = mistakes(config, outline(config))
    assert [mistake.code for mistake in found] == expected
    assert all(str(mistake).endswith(".") for mistake in found)


@pytest.mark.parametrize("schedule", ["cosine", "warm-restarts", "one-cycle", "step"])
def test_the_course_is_that_of_the_run(schedule):
    config = replace(SMALL, schedule=ScheduleConfig(schedule), data=DataConfig("synthetic", val_split=500))
    course = outline(config)
    assert (course.images, course.steps_per_epoch, course.steps) == (9500, 148, 2960)
    assert course.lr == lr_table(config.schedule, 0.1, 148, 20)
    assert {0, 2959, *course.kinks} <= set(course.rows)
    assert max(later - earlier for earlier, later in pairwise(course.rows)) <= math.ceil(2959 / 11)


def test_snapshots_are_told_and_refused_before_anything_trains(tmp_path, capsys):
    arguments = "plan --dataset synthetic --arch resnet --blocks 1 --channels 4 --schedule warm-restarts".split()
    arguments += ["--warmup", "0%", "--snapshots"]
    assert cli.main([*arguments, "--epochs", "9", "--restart-period", "4ep", "--out", str(tmp_path / "plan.png")]) == 0
    assert "snapshots   after 4, 8 epochs\n" in capsys.readouterr().out
    assert cli.main([*arguments, "--epochs", "3", "--restart-period", "4ep", "--out", str(tmp_path / "none.png")]) == 2
    assert "--snapshots would keep 0, expected 1 to 20" in capsys.readouterr().err
    assert cli.main(["plan", "--schedule", "cosine", "--snapshots"]) == 2
    assert "the schedule cosine does not read snapshots" in capsys.readouterr().err


def test_many_kinks_do_not_make_a_long_table():
    course = outline(replace(SMALL, schedule=ScheduleConfig("step", step_size="1st")))
    assert len(course.kinks) > 2000
    assert len(course.rows) < 60


def test_the_cost_is_that_of_closed_forms():
    config = replace(SMALL, optim=OptimConfig("adamw", sharpness="sam"))
    plain, spent = (cost(one, outline(one)) for one in (SMALL, config))
    steps, pixels = 20 * 156, 32 * 32
    forward = 2 * pixels * (27 * 4 + 2 * 36 * 4) + 2 * 40
    inputs = 2 * pixels * 27 * 4  # no gradient of the images is taken
    assert plain.parameters == 3 * 4 * 9 + 2 * 4 * 4 * 9 + 3 * 2 * 4 + 4 * 10 + 10
    assert plain.flops == steps * 64 * (3 * forward - inputs)
    assert spent.flops == 2 * plain.flops
    assert plain.seconds > 0


@pytest.mark.parametrize(("limit", "passes"), [("6GB", 1), ("1500MB", 10)])
def test_plan_doctor_and_run_agree_on_the_memory(limit, passes, monkeypatch):
    engine = replace(SMALL.engine, memory_limit=limit, compile="off")
    config = replace(SMALL, model=replace(SMALL.model, channels=(64,)), batch_size=500, engine=engine)
    planned = cost(config, outline(config)).memory
    assert planned.passes == passes
    run = build_trainer(resolve(config)[0]).memory
    assert (run.needed, run.micro_batch) == (planned.needed, planned.micro_batch)
    monkeypatch.setattr(doctor, "MAIN_JOB", config)
    expected = f"resnet takes about {size(planned.needed)}, {passes_in_words(planned)}"
    assert expected in doctor.memory_of(torch.device("cpu")).text


def test_what_does_not_fit_is_refused_as_a_run_is(capsys, tmp_path):
    flags = (
        "--dataset synthetic --arch resnet --blocks 1 --channels 100000 --device cpu --memory-limit 900GB --out".split()
    )
    sentences = []
    for command in ("plan", "train"):
        assert cli.main([command, *flags, str(tmp_path / "out")]) == 2
        sentences.append(capsys.readouterr().err.split(": ", 1)[1])
    assert sentences[0] == sentences[1]
    assert "resnet with 1 image a pass needs about" in sentences[0]
    assert list(tmp_path.iterdir()) == []


def test_without_the_device_everything_but_the_time_is_there():
    config = replace(SMALL, engine=EngineConfig(device="cuda:77"))
    spent = cost(config, outline(config))
    assert spent.speed is spent.seconds is None
    assert spent.parameters == cost(SMALL, outline(SMALL)).parameters


def test_the_sizes_of_what_is_drawn_and_of_what_is_read(tmp_path):
    train, test = load_dataset("synthetic"), load_dataset("synthetic", "test")
    assert SIZES["synthetic"] == DataSize(len(train), len(test), len(train.classes), train.images.shape[1])
    arrays = {"train_images": train.images[:70, :24, :24], "train_labels": train.labels[:70] % 7}
    arrays |= {"test_images": test.images[:30, :24, :24], "test_labels": test.labels[:30] % 7}
    np.savez(tmp_path / "set.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    assert data_size(DataConfig(str(tmp_path / "set.npz"))) == DataSize(70, 30, 7, 24)


@pytest.mark.data
def test_the_sizes_of_cifar():
    train, test = (load_dataset("cifar10", split, download=False) for split in ("train", "test"))
    assert SIZES["cifar10"] == DataSize(len(train), len(test), len(train.classes), train.images.shape[1])


def test_the_command_prints_and_draws(tmp_path, capsys):
    out = tmp_path / "new" / "lr.png"
    flags = "--arch resnet --blocks 1 --channels 4 --horizon 10ep --epochs 5 --lr 5 --device cpu --precision fp32"
    assert cli.main(["plan", *flags.split(), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "1,950: 5 epochs of 390, 128 images each",
        "resnet, 470 parameters",
        "Warning: cosine is laid out for 10 epochs",
        "Warning: lr 5 is 50 times above the 0.1 that suits sgd-nesterov",
        "GiB, batches of 128 whole: data set 176.2 MiB,",
        "uncompiled, on",
        str(out),
    ):
        assert text in printed
    table = lr_table(ScheduleConfig(horizon="10ep"), 5.0, 390, 5)
    rows = re.findall(r"(\d\.\d\d) ([\d,]+) ([\d.e-]+) [\d.]+%", printed)
    assert len(rows) >= 12
    for epoch, step, lr in rows:
        place = int(step.replace(",", ""))
        assert float(epoch) == pytest.approx(place / 390, abs=0.006)
        assert float(lr) == pytest.approx(table[place], rel=1e-3)
