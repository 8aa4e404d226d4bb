"""The pool of processes, with small scripts in place of training: failures, stopping, going on; and how work is
planned for it.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from made_run import RESULT

from fastcifar.config import DataConfig, EngineConfig, ModelConfig, RunConfig
from fastcifar.data.splits import validation_split
from fastcifar.engine.memory import DataSize
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.many import packed, workers
from fastcifar.many.packed import divide, how_many, most_at_once, plan_members, shares_the_gpu, train_packed
from fastcifar.many.reproduce import Task
from fastcifar.recipes import RECIPES
from fastcifar.runs.folder import Run
from fastcifar.runs.interrupt import Interrupted

CONFIG = RunConfig(
    ModelConfig("resnet", blocks=(1,), channels=(4,)), DataConfig("synthetic"), engine=EngineConfig("cpu"), epochs=3
)
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
def act(monkeypatch, tmp_path):
    """Sets what every process does, given `folder` and its `config`; the run has then ended."""
    monkeypatch.setattr(packed, "fetch", lambda config: DataSize(100, 10))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)

    def set_act(code: str) -> None:
        script = SCRIPT.format(act=code, result=json.dumps(asdict(RESULT)))
        monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", script))

    return set_act


def tasks(folder: Path, count: int) -> list[Task]:
    return [Task(RECIPES["quickstart"], replace(CONFIG, seed=seed), folder / f"seed{seed}") for seed in range(count)]


def calls(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_one_that_fails_leaves_the_others_to_run_and_is_tried_again(act, tmp_path):
    act("if config['seed'] == 1: print('fastcifar: it broke, mend it.', file=sys.stderr); sys.exit(2)")
    with pytest.raises(FastcifarError) as caught:
        train_packed(tasks(tmp_path, 4), at_once=2)
    log = tmp_path / "seed1.log"
    assert (
        str(caught.value)
        == f"1 of 4 members failed, {tmp_path / 'seed1'} since it broke, mend it; see {log}. The others are done."
    )
    assert {name for word, name, *_ in calls(tmp_path) if word == "end"} == {"seed0", "seed2", "seed3"}
    act("pass")
    train_packed(tasks(tmp_path, 4), at_once=2)
    assert [name for word, name, *_ in calls(tmp_path) if word == "begin"][4:] == ["seed1"]


def test_one_that_is_killed_says_by_what(act, tmp_path):
    act("os.kill(os.getpid(), 9)")
    with pytest.raises(FastcifarError, match="since it was killed by signal 9"):
        train_packed(tasks(tmp_path, 1))


def test_so_many_at_once_with_a_share_of_the_threads(act, tmp_path):
    act("time.sleep(0.2)")
    train_packed(tasks(tmp_path, 5), at_once=2)
    running = [0]
    for word, *_ in calls(tmp_path):
        running.append(running[-1] + (1 if word == "begin" else -1))
    assert max(running) == 2
    assert {call[2] for call in calls(tmp_path) if call[0] == "begin"} == {str(max(1, torch.get_num_threads() // 2))}


def test_a_signal_stops_all_and_the_same_call_goes_on(act, tmp_path):
    """Each is told by the end of its pipe; those that wait are not begun."""
    act("sys.stdin.buffer.read(); (folder / 'saved').touch(); sys.exit(143)")

    def interrupt() -> None:
        while not all((tmp_path / f"seed{seed}" / "config.json").exists() for seed in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        train_packed(tasks(tmp_path, 3), at_once=2)
    thread.join()
    assert stopped.value.signal_number == signal.SIGINT
    assert [(tmp_path / f"seed{seed}" / "saved").exists() for seed in range(3)] == [True, True, False]
    act("pass")
    train_packed(tasks(tmp_path, 3), at_once=2)
    assert all(Run.open(task.folder).result() for task in tasks(tmp_path, 3))


def test_a_second_signal_kills_them(act, tmp_path, monkeypatch):
    act("(folder / 'pid').write_text(str(os.getpid())); time.sleep(60)")

    def kill_twice(self) -> None:
        while not (tmp_path / "seed0" / "pid").exists() or not (tmp_path / "seed0" / "pid").read_text():
            genuine(0.01)
        signal.raise_signal(signal.SIGINT)

    genuine = time.sleep
    monkeypatch.setattr(workers.time, "sleep", kill_twice)
    with pytest.raises(KeyboardInterrupt):
        train_packed(tasks(tmp_path, 1))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "seed0" / "pid").read_text()), 0)


def test_the_members_of_report_5():
    """As it trained them, but for images to choose by, which all set apart alike; the test set is not watched."""
    entry = RECIPES["r5_ensemble_member"]
    members = plan_members(entry, range(11), Path("nowhere"), val_split=5000)
    assert [(task.config.seed, task.folder.name) for task in members] == [(seed, f"seed{seed}") for seed in range(11)]
    labels, config = torch.arange(50_000) % 10, members[0].config
    splits = [
        validation_split(labels, task.config.data.val_split, task.config.data.split_seed, 10)[1] for task in members
    ]
    assert all(torch.equal(splits[0], split) for split in splits)
    assert len(splits[0]) == 5000
    assert (config.model.arch, config.optim.optimizer, config.schedule.schedule) == ("resnet18", "adam", "step")
    assert (config.loss.loss, config.data.augment, config.average.decays) == ("asymmetric", "standard", ())
    assert (config.optim.sharpness, config.watch_test, config.epochs) == ("none", False, entry.config.epochs)


def test_a_folder_of_another_length_or_reading_is_refused(tmp_path):
    entry = RECIPES["quickstart"]
    first, second = plan_members(entry, (0, 1), tmp_path, epochs=2)
    Run.create(second.folder, second.config)
    assert plan_members(entry, (0, 1), tmp_path, epochs=2) == [first, second]
    with pytest.raises(ConfigError, match="seed1 holds a run of 2 epochs in place of 3; choose another --out"):
        plan_members(entry, (0, 1), tmp_path, epochs=3)
    with pytest.raises(ConfigError, match="val_split changed"):
        plan_members(entry, (0, 1), tmp_path, epochs=2, val_split=50)
    with pytest.raises(ConfigError, match="give more --seeds, or a recipe that keeps snapshots"):
        plan_members(entry, (0,), tmp_path)


@pytest.mark.parametrize(
    ("threads", "free", "expected"),
    [(None, 64, 8), (2, 64, 4), (3, 64, 2), (16, 64, 1), (None, 4, 3), (None, 1, 1), (None, None, 8), (16, None, 1)],
)
def test_how_many_suit_the_threads_and_the_memory(monkeypatch, threads, free, expected):
    """A run of this size takes a GiB, and a tenth stays free; none is begun on less. Where memory is not told, the
    threads alone count.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(packed, "free_memory", lambda device: free and free * 2**30)
    config = replace(CONFIG, engine=replace(CONFIG.engine, threads=threads))
    assert how_many(config, DataSize(100, 10)) == expected


def test_runs_share_a_gpu_only_under_the_multi_process_service(monkeypatch, tmp_path):
    assert most_at_once("cuda", 16, None, mps=False) == 1
    assert most_at_once("cuda", 16, 4, mps=True) == 8
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not shares_the_gpu()
    (tmp_path / "control").touch()
    assert shares_the_gpu()


def test_what_is_given_is_not_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(packed, "free_memory", lambda device: 6 * 2**30)
    assert divide(EngineConfig("cpu"), 3) == EngineConfig("cpu", threads=2, memory_limit="2048MB")
    assert divide(EngineConfig("cpu"), 1) == EngineConfig("cpu", threads=8)
    assert divide(EngineConfig("cpu", threads=5, memory_limit="2GB"), 3) == EngineConfig(
        "cpu", threads=5, memory_limit="2GB"
    )
