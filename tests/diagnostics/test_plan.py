"""`fastcifar plan`: the table is the run's, the cost is that of closed forms, and mistakes are remarked on exactly
where they are made.
"""

import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastcifar import cli
from fastcifar.config import (
    AverageConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from fastcifar.data.sources import load_dataset
from fastcifar.diagnostics import doctor
from fastcifar.diagnostics.plan import SIZES, DataSize, cost, data_size, outline, warnings
from fastcifar.engine.memory import size
from fastcifar.engine.setup import build_trainer, resolve
from fastcifar.errors import ConfigError
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


EARLY, LATE, PACE, CUT, LR = "ends after", "is laid out for", "moves once an epoch", "ends within a cycle", "that suits"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RunConfig(), []),
        (run(ScheduleConfig("linear", per="epoch", horizon="5ep", start_lr=1 / 3, final_lr=1.0, warmup="0%")), [EARLY]),
        (run(ScheduleConfig("polynomial", per="epoch", horizon="5ep", warmup="0%")), [EARLY]),
        (run(ScheduleConfig("cosine", horizon="99%")), [EARLY]),
        (run(ScheduleConfig("cosine", horizon="100ep")), []),
        (run(ScheduleConfig("cosine", per="epoch", horizon="200ep", warmup="0%")), [LATE]),
        (run(ScheduleConfig("one-cycle", per="epoch", horizon="25600ep"), epochs=200), [LATE, PACE]),
        (run(ScheduleConfig("one-cycle", per="epoch")), [PACE]),
        (run(ScheduleConfig("one-cycle")), []),
        (run(ScheduleConfig("cosine", per="epoch")), []),
        (run(ScheduleConfig("swa", horizon="75%")), []),
        (run(ScheduleConfig("swa", horizon="150%")), [LATE]),
        (run(ScheduleConfig("warm-restarts")), []),
        (run(ScheduleConfig("warm-restarts", restart_period="50ep", warmup="0%")), []),
        (run(ScheduleConfig("warm-restarts", restart_period="30ep", warmup="0%")), [CUT]),
        (run(ScheduleConfig("step", per="epoch", step_size="30ep")), []),
        (run(ScheduleConfig("multistep")), []),
        (run(ScheduleConfig("plateau")), []),
        (run(optim=OptimConfig("adam", lr=0.1)), [LR]),
        (run(optim=OptimConfig("sgd", lr=1.0)), []),
        (run(optim=OptimConfig("sgd", lr=1.01)), [LR]),
        (run(optim=OptimConfig("sgd", lr=0.01)), []),
        (run(optim=OptimConfig("sgd", lr=0.0099)), [LR]),
        (replace(run(optim=OptimConfig("sgd", scale_lr="linear")), batch_size=4096), []),
    ],
    ids=lambda value: f"{value.schedule.schedule} {value.schedule.horizon}" if isinstance(value, RunConfig) else None,
)
def test_mistakes_are_remarked_on_where_they_are_made_and_nowhere_else(config, expected):
    found = warnings(config, outline(config))
    assert len(found) == len(expected)
    for text, part in zip(found, expected, strict=True):
        assert part in text


def test_remarks_say_what_the_reports_did_not_see():
    linear = run(
        ScheduleConfig("linear", per="epoch", horizon="5ep", start_lr=1 / 3, final_lr=1.0, warmup="0%"), epochs=200
    )
    assert warnings(linear, outline(linear)) == [
        "linear ends after 5 of 200 epochs and stays at lr 0.1, 100% of the peak; without --horizon it ends with the "
        "run."
    ]
    cosine = run(ScheduleConfig("cosine", horizon="200ep", warmup="0%"))
    assert warnings(cosine, outline(cosine)) == [
        "cosine is laid out for 200 epochs, but the run ends after 100, at lr 0.05, 50% of the peak; leave --horizon "
        "out."
    ]


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        (ModelConfig("resnet_prop"), False),
        (ModelConfig("resnet_prop", weight_init="he"), False),
        (ModelConfig("resnet_prop", weight_init="he", final_norm=False), True),
        (ModelConfig("resnet_prop", final_norm=False), True),
        (ModelConfig("resnet20_v2"), False),
        (ModelConfig("resnet20_v2", weight_init="he"), True),
        (ModelConfig("resnet", pre_activation=True), True),
        (ModelConfig("resnet"), False),
        (ModelConfig("wrn28_2"), False),
    ],
    ids=lambda value: f"{value.arch} {value.options}" if isinstance(value, ModelConfig) else None,
)
def test_a_network_that_begins_too_large_is_remarked_on(model, warned):
    config = replace(SMALL, model=model)
    assert any("without a norm before its classifier" in text for text in warnings(config, outline(config))) == warned


@pytest.mark.parametrize("schedule", ["cosine", "warm-restarts", "one-cycle", "step"])
def test_the_course_is_that_of_the_run(schedule):
    config = replace(SMALL, schedule=ScheduleConfig(schedule), data=DataConfig("synthetic", val_split=500))
    course = outline(config)
    assert (course.images, course.steps_per_epoch, course.steps) == (9500, 148, 2960)
    assert course.lr == lr_table(config.schedule, 0.1, 148, 20)
    assert {0, 2959, *course.kinks} <= set(course.rows)
    assert max(later - earlier for earlier, later in zip(course.rows, course.rows[1:], strict=False)) <= math.ceil(
        2959 / 11
    )


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cost_is_that_of_closed_forms(precision):
    optim, average = OptimConfig("adamw", sharpness="sam"), AverageConfig(ema_decay=(0.9, 0.99), swa_start="50%")
    config = replace(SMALL, optim=optim, average=average, engine=replace(SMALL.engine, precision=precision))
    plain = cost(SMALL, outline(SMALL))
    spent = cost(config, outline(config))
    parameters = 3 * 4 * 9 + 2 * 4 * 4 * 9 + 3 * 2 * 4 + 4 * 10 + 10
    weights = 4 * (parameters + 3 * 2 * 4)
    assert spent.parameters == parameters
    steps, pixels = 20 * 156, 32 * 32
    forward = 2 * pixels * (27 * 4 + 2 * 36 * 4) + 2 * 40
    inputs = 2 * pixels * 27 * 4  # no gradient of the images is taken
    assert plain.flops == steps * 64 * (3 * forward - inputs)
    assert spent.flops == 2 * plain.flops
    held = spent.memory.parts
    assert held["data set"] == 12_000 * (3 * pixels + 8)
    assert held["weights"] - weights <= 3 * 8  # the norms may count their batches
    assert held["gradients"] == 4 * parameters
    assert held["averages"] == 3 * held["weights"]
    assert held["weights that SAM returns to"] == held["weights"]
    assert 2 * 4 * parameters <= held["optimiser"] <= 2 * 4 * parameters + 4 * 20
    assert plain.memory.parts["optimiser"] == 4 * parameters
    assert held["activations"] * (2 if precision == "bf16" else 1) == plain.memory.parts["activations"]
    assert plain.memory.parts["activations"] >= 64 * 4 * pixels * 4 * 3
    assert (spent.memory.passes, spent.memory.needed) == (1, sum(held.values()))
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
    assert f"resnet takes about {size(planned.needed)}, {planned.manner}" in doctor.memory_of(torch.device("cpu")).text


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
    assert spent.seconds is None
    assert "cuda:77 was not found" in spent.measured
    assert spent.parameters == cost(SMALL, outline(SMALL)).parameters


def test_the_sizes_of_what_is_drawn_and_of_what_is_read(tmp_path):
    train, test = load_dataset("synthetic"), load_dataset("synthetic", "test")
    assert SIZES["synthetic"] == DataSize(len(train), len(test), len(train.classes), train.images.shape[1])
    arrays = {"train_images": train.images[:70, :24, :24], "train_labels": train.labels[:70] % 7}
    arrays |= {"test_images": test.images[:30, :24, :24], "test_labels": test.labels[:30] % 7}
    np.savez(tmp_path / "set.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    assert data_size(DataConfig(str(tmp_path / "set.npz"))) == DataSize(70, 30, 7, 24)


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar10"])
def test_the_sizes_of_cifar(name):
    train, test = load_dataset(name, download=False), load_dataset(name, "test", download=False)
    assert SIZES[name] == DataSize(len(train), len(test), len(train.classes), train.images.shape[1])


def test_the_command_prints_and_draws(tmp_path, capsys):
    out = tmp_path / "new" / "lr.png"
    flags = (
        "--arch resnet --blocks 1 --channels 4 --schedule cosine --horizon 10ep "
        "--epochs 5 --lr 5 --device cpu --precision fp32"
    )
    assert cli.main(["plan", *flags.split(), "--out", str(out)]) == 0
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


def line(picture) -> np.ndarray:
    """The height, in pixels from the bottom, of matplotlib's first colour in each column that has it."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    blue = (abs(pixels - np.array([31, 119, 180])) < 30).all(axis=2)
    columns = blue.any(axis=0)
    return len(blue) - np.argmax(blue[:, columns], axis=0)


def test_the_picture_shows_the_curve(tmp_path):
    from fastcifar.analysis.picture import draw
    from fastcifar.analysis.plots import plot_lr

    path = tmp_path / "lr.png"
    assert draw(path, plot_lr, lr_table(ScheduleConfig("linear", warmup="0%"), 0.1, 10, 20), 10, []) is None
    assert path.read_bytes().startswith(b"\x89PNG")
    height = line(path)
    assert len(height) > 500
    middle = (height[0] + height[-1]) / 2
    assert height[len(height) // 2] == pytest.approx(middle, abs=4)
    assert height[0] - height[-1] > 150


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--warmup 200ep", "a warm-up of 78000 steps fills the whole run of 78000; shorten --warmup"),
        ("--schedule cosine --gamma 0.5", "the schedule cosine does not read gamma; it reads per, horizon, final_lr"),
        ("--batch-size 50001", "batch size 50001 exceeds the 50000 training images; lower --batch-size"),
        ("--val-split 50000", "a validation split of 50000 leaves none of 50000 images"),
        ("--recipe quickstar", "did you mean quickstart"),
    ],
    ids=str,
)
def test_refusals_come_without_torch(flags, expected, tmp_path):
    code = (
        "import sys; from fastcifar import cli; "
        f"status = cli.main({['plan', *flags.split()]!r}); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert expected in " ".join(done.stderr.split())
    assert done.stdout.split() == ["2", "False"]
    assert list(tmp_path.iterdir()) == []


def test_a_larger_network_than_allowed_is_refused():
    config = replace(SMALL, model=replace(SMALL.model, max_params=100))
    with pytest.raises(ConfigError, match="100"):
        cost(config, outline(config))
