"""The command line: immediate help, refusals that name the way out, completion, and commands without training."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fastcifar import cli
from fastcifar.augment import BACKENDS, NORMALIZATIONS
from fastcifar.augment.policy import POLICIES
from fastcifar.commands import COMMANDS, Resume
from fastcifar.config import DataConfig, ModelConfig, RunConfig
from fastcifar.data.sources import DATASETS
from fastcifar.models import ARCHITECTURES
from fastcifar.optim import OPTIMIZERS
from fastcifar.optim.schedules import SCHEDULES
from fastcifar.settings import settings_of


def refusal(capsys, *arguments: str) -> str:
    """Returns what a refused command line prints: one line, with an exit status of 2."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastcifar: ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def printed(capsys, *arguments: str) -> str:
    """Returns what a command line prints that ends the program at once, with an exit status of 0."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert not exit_.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "unknown command 'tran'; did you mean train"),
        (["--arch", "resnet18"], "unknown command '--arch'; choose one of"),
        (["train", "--epoch", "3"], "train knows no --epoch; did you mean --epochs?"),
        (["train", "-lr", "3"], "train knows no -lr; did you mean --lr?"),
        (["export", "run", "--fromat", "onnx"], "export knows no --fromat; did you mean --format?"),
        (["eval", "run", "--epochs", "3"], "eval knows no --epochs; `fastcifar eval --help` lists its flags."),
        (["train", "--lr"], "--lr: expected one argument"),
        (["train", "--blocks", "--lr", "3"], "--blocks: expected at least one argument"),
        (["eval"], "the following arguments are required: RUN; fastcifar eval --help"),
        (["predict", "run"], "the following arguments are required: --images"),
        (["train", "resnet18"], "train cannot use 'resnet18'; did you mean --arch resnet18?"),
        (["eval", "a", "b"], "eval cannot use 'b'"),
        (["completion", "tcsh"], "unknown shell 'tcsh'; did you mean"),
        (["train", "--recipe", "quickstar"], "did you mean quickstart?"),
        (["train", "--precision", "bf61"], "unknown precision 'bf61'; did you mean bf16"),
        (["train", "--epochs", "many"], "--epochs is 'many'; expected a whole number."),
        (["train", "--lr", "-1e-3"], "lr is -0.001; expected above 0"),
        (["train", "--lr=abc"], "--lr is 'abc'; expected a number."),
        (["train", "--threads", "100000"], "threads is 100000; expected 1 to 1024."),
        (["train", "--out", "~nobody-9/x"], "~nobody-9/x begins with the name of an unknown user; give another path"),
        (["eval", "a\0b"], r"RUN is 'a\x00b'; expected text without NUL."),
        (["train", "--data-dir", "a\0b"], r"--data-dir is 'a\x00b'; expected text without NUL."),
        (
            ["train", "--dataset", "synthetic", "--teacher", "~nobody-9/run"],
            "~nobody-9/run begins with the name of an unknown user",
        ),
        (
            ["train", "--arch", "resnet18", "--blocks", "2", "2"],
            "resnet18 does not read the option 'blocks'; it is for resnet.",
        ),
        (["train", "--resume", "somewhere", "--lr", "3"], "leave the other flags out"),
        (["train", "--device", "cuda:abc"], "choose auto, cpu, cuda or cuda:INDEX"),
        (["preview", "standart"], "did you mean standard"),
        (["plan", "--warmup", "200ep"], "a warm-up of 78000 steps fills the whole run of 78000; shorten --warmup"),
        (["plan", "--gamma", "0.5"], "the schedule cosine does not read gamma; it reads per, horizon, final_lr"),
        (["plan", "--batch-size", "50001"], "exceeds the 50000 training images; lower --batch-size"),
        (["plan", "--val-split", "50000"], "a validation split of 50000 leaves none of 50000 images"),
        (["train", "--config", "nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["train", "--config", "a", "--recipe", "b"], "give one of them"),
        (["train", "--warmup", "5"], "write epochs as 5ep"),
        (["train", "--dataset", "synthetic", "--precision", "fp16", "--device", "cpu"], "float16 needs a GPU"),
        (["train", "--dataset", "synthetic", "--device", "cuda:77"], "device cuda:77 was not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals_are_short_and_name_the_way_out(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_and_refusals_come_without_torch():
    """This keeps them under a second: 0.2 s on an idle machine."""
    lines = [
        "",
        "train --help",
        "train --recipe quickstart --help",
        "train --arch resnet_porp",
        "train --learning-rate 3",
        "plan --warmup 200ep",
        "plan --batch-size 50001",
        "plan --val-split 50000",
        "eval run --data-dir nowhere",
        "ensemble --recipe quickstar",
        "recipes r5_*",
        "reproduce r9_*",
        "completion bash -- train --arch",
    ]
    code = f"""
import contextlib, sys
from fastcifar import cli
for line in {lines!r}:
    with contextlib.suppress(SystemExit):
        cli.main(line.split())
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_that_other_programs_use_find_their_flag(capsys):
    for typed, meant in cli.SYNONYMS.items():
        command = "eval" if meant.startswith("tta") else "train"
        assert f"{command} knows no --{typed}; did you mean --{meant}?" in refusal(capsys, command, f"--{typed}", "1")


def test_help_lists_the_commands_and_the_version_is_the_packages(capsys):
    help_ = printed(capsys)
    assert help_ == printed(capsys, "--help") == printed(capsys, "-h")
    assert all(name in help_ for name in COMMANDS)
    assert printed(capsys, "--version") == f"fastcifar {metadata.version('fastcifar')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_flag_and_no_type_riddle(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    help_ = printed(capsys, command, "--help", "--no-such-flag")
    for setting in settings_of(COMMANDS[command]):
        assert setting.text, "a field without a sentence under it"
        assert all(flag in help_ for flag in setting.flags)
    assert not any(riddle in help_ for riddle in ("None", "{", "SUPPRESS", "==", "to_json"))
    assert max(map(len, help_.splitlines())) <= 80


def test_help_names_all_there_is_to_choose_from(capsys):
    words = set(re.split(r"[\s,;\[\]]+", printed(capsys, "train", "--help")))
    for names in (ARCHITECTURES, OPTIMIZERS, SCHEDULES, DATASETS, POLICIES, NORMALIZATIONS, BACKENDS):
        assert words >= set(names)
    assert words >= {"cross-entropy", "asymmetric", "he", "pytorch", "basic", "bottleneck", "bf16", "asam", "sqrt"}


def test_help_says_the_default_of_each_choice_or_else_of_the_recipe(capsys):
    def says(*arguments: str) -> str:
        return " ".join(printed(capsys, *arguments, "--help").split())

    for default in (
        "0.1; 0.2 in multistep",
        "16 in resnet_s4_deep; 32 in resnetrs50, resnetrs101, resnetrs50_cifar",
        "no; yes in resnet_prop",
        "128",
    ):
        assert f"[default: {default}]" in says("train")
    assert "Peak learning rate. [default: 0.2]" in says("plan", "--recipe", "quickstart")
    assert "unknown recipe 'quickstar'" in refusal(capsys, "train", "--recipe", "quickstar", "--help")


def test_a_data_dir_that_is_not_there_is_not_made(capsys, monkeypatch, tmp_path):
    """It may be typed, or stand in the file of another run."""
    monkeypatch.chdir(tmp_path)
    sentence = refusal(capsys, "eval", "run", "--data-dir", "my data")
    assert "data_dir my data is no folder; correct it, or make one with: mkdir -p 'my data'" in sentence
    file = tmp_path / "config.json"
    file.write_text(RunConfig(data=DataConfig(dataset="synthetic", data_dir=tmp_path / "gone")).to_json())
    assert "gone is no folder" in refusal(capsys, "train", "--config", str(file))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tra", ["train"]),
        ("train --arch resnet1", ["resnet18"]),
        ("train --arch = resnet1", ["resnet18"]),
        ("train --arch=resnet1", ["--arch=resnet18"]),
        ("train --no-wa", ["--no-watch-test"]),
        ("plan --optimizer sgd-", ["sgd-nesterov"]),
        ("train --precision b", ["bf16"]),
        ("train --recipe quick", ["quickstart"]),
        ("reproduce r4_final r1_resnet_prop_standard quick", ["quickstart"]),
        ("preview standard cutout", ["cutout_4x4", "cutout_1x16"]),
        ("export run --format o", ["onnx"]),
        ("eval runs/my", []),
        ("train --data-dir d", []),
        ("nonsense ", []),
    ],
)
def test_completion(capsys, words, expected):
    assert cli.main(["completion", "bash", "--", *words.split(" ")]) == 0
    assert capsys.readouterr().out.split() == expected


LINE = "fastcifar train --arch resnet1"
ASK = {
    "bash": f"""source <(fastcifar completion bash); COMP_WORDS=({LINE}); COMP_CWORD=3
        _fastcifar; echo "${{COMPREPLY[@]}}" """,
    "zsh": f"""compdef() {{ }}; compadd() {{ echo $candidates }}
        source <(fastcifar completion zsh); words=({LINE}); CURRENT=4; _fastcifar""",
    "fish": f"fastcifar completion fish | source; complete -C '{LINE}'",
}


@pytest.mark.parametrize("shell", ASK)
def test_the_script_of_a_shell_completes_there(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "fastcifar"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastcifar "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", ASK[shell]], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["resnet18"], done.stderr


def test_values_of_every_kind_are_read():
    assert cli.parse(["train", "--resume", "run"]) == Resume(Path("run"), None)
    assert cli.parse(["train", "--resume=run", "--epochs", "20"]) == Resume(Path("run"), 20)
    assert cli.parse(["recipes"]).names == ()
    command = cli.parse(["predict", "a", "b", "--images", "x.npz", "--tta", "mirror", "--probabilities"])
    assert (command.runs, command.images) == ((Path("a"), Path("b")), Path("x.npz"))
    assert (command.tta, command.probabilities) == ("mirror", True)
    flags = "--arch resnet --blocks 2 2 --channels 8 16 --no-decay-norms --ema-decay 0.9 0.99 --max-params 5e6"
    run = cli.parse(["train", *flags.split()]).run
    assert (run.model.blocks, run.model.max_params) == ((2, 2), 5e6)
    assert (run.optim.decay_norms, run.average.ema_decay) == (False, (0.9, 0.99))


def test_count(capsys):
    command = "count --arch resnet --blocks 3 3 2 3 --channels 64 128 128 256 --pool 4"
    assert cli.main(command.split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "resnet: 4,935,242 parameters; an image takes" in printed
    assert "stage1.0.branch.0" in printed


def test_flags_override_the_recipe_and_the_file(tmp_path):
    command = cli.parse(["train", "--recipe", "quickstart", "--epochs", "7"])
    assert command.run.epochs == 7
    assert command.run.recipe == "quickstart"
    assert command.run.model.blocks == (1, 1, 1)
    file = tmp_path / "config.json"
    file.write_text(command.run.to_json())
    again = cli.parse(["train", f"--config={file}", "--seed", "5"])
    assert (again.run.epochs, again.run.seed, again.run.recipe) == (7, 5, "quickstart")


def test_preview(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastcifar.diagnostics.preview.preview", lambda policies, dataset, out, **options: [out])
    assert cli.main(["preview", "--augment", "standard,cutout:2x4", "--dataset", "synthetic", "--out", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n"


def test_the_main_job_parses_with_every_other_default():
    run = cli.parse(["train", "--arch", "resnet_prop", "--epochs", "200"]).run
    assert run == RunConfig(ModelConfig("resnet_prop"), epochs=200)
    assert (run.batch_size, run.data.augment, run.optim.resolved.lr) == (128, "standard", 0.1)


def test_another_choice_drops_the_settings_of_the_recipes_own():
    """A rate that suits one optimiser ruins another."""
    parts = "--arch resnet20_v2 --optimizer adamw --schedule constant".split()
    run = cli.parse(["train", "--recipe", "quickstart", *parts]).run
    assert (run.model.options, run.optim.resolved.lr, run.schedule.warmup) == ({}, 3e-3, "15%")
    assert cli.parse(["train", "--recipe", "quickstart", "--optimizer", "adamw", "--lr", "0.5"]).run.optim.lr == 0.5
    assert cli.parse(["train", "--recipe", "quickstart", "--arch", "resnet20_v2"]).run.optim.lr == 0.2
