"""What is printed: no terminal acts on it, and an output that is closed or full ends no training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import make_data

from fastcifar import cli
from fastcifar.output import printable, show
from fastcifar.recipes.listing import aligned
from fastcifar.runs.console import Console
from fastcifar.runs.records import read_records

CLEAR = "\x1b[2Ja\x9b\r\u202eb\udcff"
ESCAPED = r"\x1b[2Ja\x9b\r\u202eb\udcff"
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="has no /dev/full")


def recipes(**options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastcifar", "recipes"], stderr=subprocess.PIPE, text=True, **options)


def test_whatever_a_terminal_would_act_on_is_escaped(capsys):
    assert printable(CLEAR) == ESCAPED
    assert printable("Füchse 狐狸 🦊 می‌خواهم") == "Füchse 狐狸 🦊 می‌خواهم"
    show(f"{CLEAR}\nnext")
    Console().note(f"{CLEAR}\nnext")
    assert capsys.readouterr().out == 2 * f"{ESCAPED}\nnext\n"
    assert aligned([(CLEAR, "a"), ("b", "c")]).splitlines() == [f"{ESCAPED}  a", f"{'b':{len(ESCAPED)}}  c"]
    assert cli.main(["eval", f"run{CLEAR}\n"]) == 2
    assert capsys.readouterr().err.startswith(rf"fastcifar: run{ESCAPED}\n is no run")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="has no SIGPIPE")
def test_a_reader_that_leaves_ends_a_list_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = recipes(stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@needs_full
def test_a_full_output_ends_a_list_in_one_sentence():
    with FULL.open("w") as output:
        done = recipes(stdout=output)
    sentence = "standard output cannot be used (No space left on device); see that it is there and has room."
    assert (done.returncode, done.stderr) == (2, f"fastcifar: {sentence}\n")


def test_an_output_that_is_closed_or_knows_few_letters_is_no_error():
    closed = recipes(preexec_fn=lambda: [os.close(number) for number in (0, 1)])
    assert (closed.returncode, closed.stderr) == (0, "")
    code = "from fastcifar import cli; from fastcifar.output import show; cli.prepare_streams(); show('狐')"
    few = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run([sys.executable, "-c", code], env=few, capture_output=True).stdout == b"\\u72d0\n"


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Returns the command line of a run of two epochs, which a test trains in a moment."""
    flags = "--arch resnet --blocks 1 --channels 4 --batch-size 20 --epochs 2 --device cpu --compile off --threads 1"
    return ["train", "--dataset", str(make_data(tmp_path)), *flags.split(), "--out", str(tmp_path / "run")]


@pytest.mark.parametrize("output", ["full", "closed"])
@needs_full
def test_training_goes_on_without_its_output(output, arguments, tmp_path, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with FULL.open("w") if output == "full" else os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(arguments) == 0
    reason = {"full": "No space left on device", "closed": "Broken pipe"}[output]
    assert capsys.readouterr().err == f"Standard output cannot be written ({reason}); training goes on without it.\n"
    assert [record.epoch for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "result.json").exists()


def test_an_epoch_is_kept_before_it_is_shown(arguments, tmp_path, monkeypatch):
    run, kept = tmp_path / "run", []
    monkeypatch.setattr(
        Console,
        "write",
        lambda self, record: kept.append((len(read_records(run / "metrics.jsonl")), (run / "checkpoints").exists())),
    )
    assert cli.main(arguments) == 0
    assert kept == [(1, True), (2, True)]
