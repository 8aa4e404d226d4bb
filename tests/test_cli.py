"""The command line: immediate help, refusals that name the way out, and the commands that need no training."""

import subprocess
import sys
import time

import pytest

from fastcifar import cli

FASTCIFAR = [sys.executable, "-m", "fastcifar.cli"]


def refusal(capsys, *arguments: str) -> str:
    """What a refused command line prints; its exit status is 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "unknown command 'tran'; did you mean train"),
        (["train", "--epoch", "3"], "Perhaps you meant: --epochs"),
        (["train", "--arch", "resnet_propp"], "did you mean resnet_prop"),
        (["train", "--recipe", "quickstar"], "did you mean quickstart?"),
        (["train", "--dataset", "cifar-10"], "did you mean cifar10"),
        (["train", "--precision", "bf61"], "'bf16', 'fp16', 'fp32'"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--arch", "resnet18", "--blocks", "2", "2"], "resnet18 does not read the option 'blocks'; it is for resnet."),
        (["train", "--resume", "somewhere", "--epochs", "3"], "leave the other flags out"),
        (["train", "--resume=somewhere", "--epochs", "3"], "leave the other flags out"),
        (["train", "--resume", "nowhere"], "nowhere is no run"),
        (["train", "--device", "cuda:abc"], "choose auto, cpu, cuda or cuda:INDEX"),
        (["train", "--dataset", "synthetic", "--arch", "resnet", "--stem-channels", "-5"], "stem_channels must all be at least 1"),
        (["preview", "standart"], "did you mean standard"),
        (["preview", "--augment", "crop:99", "--dataset", "synthetic"], "crop is 99"),
        (["train", "--config", "nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["train", "--config", "a", "--recipe", "b"], "give one of them"),
        (["train", "--warmup", "5"], "write epochs as 5ep"),
        (["train", "--dataset", "synthetic", "--precision", "fp16", "--device", "cpu"], "float16 training needs a GPU"),
        (["train", "--dataset", "synthetic", "--device", "cuda:77"], "device cuda:77 was not found"),
        (["train", "--dataset", "synthetic", "--batch-size", "10001"], "exceeds the 10000 training images"),
        (["train", "--dataset", "synthetic", "--val-split", "99999"], "choose 1 to 9999"),
        (["eval", "nowhere"], "nowhere is no run"),
        (["count", "--arch", "resnet", "--blocks", "1", "1"], "blocks names 2 stages and channels 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals_are_short_and_name_the_way_out(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--arch", "resnet_porp"]], ids=" ".join)
def test_help_and_refusals_come_without_torch(arguments):
    """Which keeps them under a second; the check is the absence of the import, and the time is only printed."""
    code = f"""
import sys
from fastcifar import cli
try:
    cli.main({arguments!r})
finally:
    assert "torch" not in sys.modules
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    assert "AssertionError" not in done.stderr
    assert "Traceback" not in done.stderr
    assert elapsed < 10, "an import has crept in: this takes 0.2 s on an idle machine"


def test_help_lists_the_commands():
    done = subprocess.run([*FASTCIFAR, "--help"], capture_output=True, text=True, check=True)
    for name in cli.COMMANDS:
        assert name in done.stdout


def test_count(capsys):
    assert cli.main(["count", "--arch", "resnet20_v2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "resnet20_v2: 272,154 parameters; an image takes 0.0816 GFLOP forward, 0.2440 GFLOP in training" in printed
    assert "stage1.0.branch.0" in printed


def test_count_of_a_generic_network(capsys):
    command = "count --arch resnet --blocks 3 3 2 3 --channels 64 128 128 256 --pool 4"
    assert cli.main(command.split()) == 0
    assert "4,935,242 parameters" in " ".join(capsys.readouterr().out.split())


def test_flags_override_the_recipe_and_the_file(tmp_path):
    command = cli.parse(["train", "--recipe", "quickstart", "--epochs", "7"])
    assert command.run.epochs == 7
    assert command.run.recipe == "quickstart"
    assert command.run.model.blocks == (1, 1, 1)
    file = tmp_path / "config.json"
    file.write_text(command.run.to_json())
    again = cli.parse(["train", f"--config={file}", "--seed", "5"])
    assert (again.run.epochs, again.run.seed, again.run.recipe) == (7, 5, "quickstart")


def test_another_architecture_drops_the_recipes_options():
    run = cli.parse(["train", "--recipe", "quickstart", "--arch", "resnet20_v2"]).run
    assert (run.model.arch, run.model.options, run.optim.lr) == ("resnet20_v2", {}, 0.2)


def test_preview(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    command = ["preview", "--augment", "standard,cutout:2x4", "--dataset", "synthetic", "--count", "3", "--show-params", "--out", str(out)]
    assert cli.main(command) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_the_main_job_parses_with_every_other_default():
    run = cli.parse(["train", "--arch", "resnet_prop", "--epochs", "200"]).run
    assert (run.model.arch, run.epochs, run.batch_size, run.data.augment, run.optim.resolved.lr) == (
        "resnet_prop",
        200,
        128,
        "standard",
        0.1,
    )


def test_another_optimiser_or_schedule_drops_the_old_ones_settings():
    """A rate that suits one optimiser ruins another."""
    run = cli.parse(["train", "--recipe", "quickstart", "--optimizer", "adamw", "--schedule", "constant"]).run
    assert (run.optim.resolved.lr, run.schedule.schedule, run.schedule.warmup) == (3e-3, "constant", "15%")
    assert cli.parse(["train", "--recipe", "quickstart", "--optimizer", "adamw", "--lr", "0.5"]).run.optim.lr == 0.5
