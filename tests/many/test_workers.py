"""Jobs in processes of their own, with small scripts in place of training: failures, stopping, going on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from made_run import CONFIG, RESULT

from fastcifar.engine.memory import DataSize
from fastcifar.errors import FastcifarError
from fastcifar.many import packed, workers
from fastcifar.many.jobs import Job
from fastcifar.many.packed import train_packed
from fastcifar.recipes import RECIPES
from fastcifar.runs.console import Silence
from fastcifar.runs.interrupt import Interrupted

SCRIPT = """
import json, os, sys, time
from pathlib import Path
order = json.loads(sys.stdin.buffer.readline())
folder, config = Path(order["folder"]), json.loads(order["config"])
with open(folder.parent / "calls", "a") as calls:
    print("begin", folder.name, config["engine"]["threads"], file=calls)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text(order["config"])
{act}
with open(folder.parent / "calls", "a") as calls:
    print("end", folder.name, file=calls)
(folder / "result.json").write_text({result!r})
"""


@pytest.fixture
def act(monkeypatch):
    """Sets what every process does, given `folder` and its `config`; the run has then ended."""
    monkeypatch.setattr(packed, "fetch", lambda config: DataSize(100, 10))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)

    def set_act(code: str) -> None:
        script = SCRIPT.format(act=code, result=json.dumps(asdict(RESULT)))
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", script))

    return set_act


def train_seeds(folder: Path, count: int, at_once: int | None = None) -> None:
    quickstart = RECIPES["quickstart"]
    jobs = [Job(quickstart, replace(CONFIG, seed=seed), folder / f"seed{seed}") for seed in range(count)]
    train_packed(jobs, at_once, Silence())


def calls(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_one_that_fails_leaves_the_others_to_run_and_is_tried_again(act, tmp_path):
    act("if config['seed'] == 1: print('fastcifar: it broke, mend it.', file=sys.stderr); sys.exit(2)")
    with pytest.raises(FastcifarError) as caught:
        train_seeds(tmp_path, 4, at_once=2)
    failed = f"{tmp_path / 'seed1'} since it broke, mend it; see {tmp_path / 'seed1.log'}"
    assert str(caught.value) == f"1 of 4 members failed, {failed}. The others are done."
    assert {name for word, name, *_ in calls(tmp_path) if word == "end"} == {"seed0", "seed2", "seed3"}
    act("pass")
    train_seeds(tmp_path, 4, at_once=2)
    assert [name for word, name, *_ in calls(tmp_path) if word == "begin"][4:] == ["seed1"]


def test_one_that_is_killed_says_by_what_and_nothing_of_others_where_there_are_none(act, tmp_path):
    """Its output goes to a new file, not to where a link may lead."""
    (outside := tmp_path / "outside").write_text("mine")
    (tmp_path / "seed0.log").symlink_to(outside)
    act("os.kill(os.getpid(), 9)")
    with pytest.raises(FastcifarError, match=r"since it was killed by signal 9; see .*seed0\.log\.$"):
        train_seeds(tmp_path, 1)
    assert outside.read_text() == "mine"


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    for name in ("json", "rich", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')")
    assert subprocess.run(workers.COMMAND, cwd=tmp_path, stdin=subprocess.DEVNULL).returncode == 0


def test_so_many_at_once_with_a_share_of_the_threads(act, tmp_path):
    act("time.sleep(0.2)")
    train_seeds(tmp_path, 5, at_once=2)
    running = [0]
    for word, *_ in calls(tmp_path):
        running.append(running[-1] + (1 if word == "begin" else -1))
    assert max(running) == 2
    assert {call[2] for call in calls(tmp_path) if call[0] == "begin"} == {str(max(1, torch.get_num_threads() // 2))}


def test_a_signal_stops_all_and_the_same_call_goes_on(act, tmp_path):
    """Each process is told by the end of its pipe; those that wait are not begun."""
    act("sys.stdin.buffer.read(); (folder / 'saved').touch(); sys.exit(143)")

    def interrupt() -> None:
        while not all((tmp_path / f"seed{seed}" / "config.json").exists() for seed in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        train_seeds(tmp_path, 3, at_once=2)
    thread.join()
    assert stopped.value.signal_number == signal.SIGINT
    assert [(tmp_path / f"seed{seed}" / "saved").exists() for seed in range(3)] == [True, True, False]
    act("pass")
    train_seeds(tmp_path, 3, at_once=2)
    assert all((tmp_path / f"seed{seed}" / "result.json").exists() for seed in range(3))


def test_a_second_signal_kills_them(act, tmp_path, monkeypatch):
    act("(folder / 'pid').write_text(str(os.getpid())); time.sleep(60)")
    pid, genuine = tmp_path / "seed0" / "pid", time.sleep

    def signal_once_it_runs(seconds: float) -> None:
        while not pid.exists() or not pid.read_text():
            genuine(0.01)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(workers.time, "sleep", signal_once_it_runs)
    with pytest.raises(KeyboardInterrupt):
        train_seeds(tmp_path, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
