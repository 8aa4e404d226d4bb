"""What the parts run, each item in a process of its own: tests and benchmarks by pytest, training by fastcifar itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from comparison import Outcome, compare, task_for

from fastcifar.analysis.results import Row
from fastcifar.config import DataConfig, EngineConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.data.synthetic import synthetic
from fastcifar.engine.host import matmul_flops_per_second, peak_memory_bytes
from fastcifar.engine.reproduce import reproduce
from fastcifar.engine.resolve import resolve
from fastcifar.engine.run import prepare_machine
from fastcifar.engine.trainer import Trainer
from fastcifar.models.count import count_network
from fastcifar.recipes import RECIPES
from suite.networks import NETWORKS
from suite.records import InputSpeed, NetworkProfile, OpSpeed, PartlyFailed, Settings, TestFile, TrainingSpeed

ROOT = Path(__file__).resolve().parents[2]
NOTHING_COLLECTED = 5
"""pytest's exit status where no test was chosen."""
EPOCHS = 3
"""Under the clock, after one to warm up."""


def run_pytest(*arguments: str) -> int:
    """pytest in the checkout; returns its exit status: 0, or 1 where tests failed. Raises RuntimeError where it could not run them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status not in (0, 1):
        why = "no test was chosen" if status == NOTHING_COLLECTED else f"exit status {status}"
        raise RuntimeError(f"pytest {' '.join(arguments[:2])} did not run ({why})")
    return status


def correctness(item: str, settings: Settings, folder: Path) -> list[TestFile]:
    """The GPU tests of the file `item`."""
    report = folder / "junit.xml"
    run_pytest(item, "-m", "gpu", f"--junitxml={report}")
    return [test_file(item, ElementTree.parse(report).getroot())]


def test_file(name: str, report: ElementTree.Element) -> TestFile:
    """The row that pytest's JUnit report comes to."""
    cases = list(report.iter("testcase"))
    failures, reasons = {}, Counter()
    for case in cases:
        for outcome in case:
            message = (outcome.get("message") or outcome.text or outcome.tag).strip().splitlines()[0][:400]
            if outcome.tag in ("failure", "error"):
                failures[case.get("name", "")] = message
            elif outcome.tag == "skipped":
                reasons[message] += 1
    skipped, seconds = sum(reasons.values()), sum(float(case.get("time", 0)) for case in cases)
    return TestFile(name, len(cases) - len(failures) - skipped, len(failures), skipped, seconds, failures, dict(reasons))


def benchmark_rows(folder: Path, row: Callable[[str, dict[str, Any]], Any], *arguments: str) -> list[Any]:
    """What `row` makes of the name and the figures of each benchmark. Raises PartlyFailed where some failed."""
    report, junit = folder / "benchmark.json", folder / "junit.xml"
    status = run_pytest(*arguments, f"--benchmark-json={report}", f"--junitxml={junit}")
    measured = json.loads(report.read_text("utf-8"))["benchmarks"] if report.exists() and report.stat().st_size else []
    rows = [row(entry["name"], entry["extra_info"]) for entry in measured]
    if status:
        failures = test_file(arguments[0], ElementTree.parse(junit).getroot()).failures
        raise PartlyFailed(rows, "; ".join(f"{name}: {why}" for name, why in failures.items()))
    return rows


def kernels(item: str, settings: Settings, folder: Path) -> list[OpSpeed]:
    """One op at one dtype, such as `squeeze_excite bfloat16`, in every network case."""
    op, dtype = item.split()
    return benchmark_rows(folder, partial(op_speed, op), "benchmarks/test_kernels.py", "-k", f"test_op[{op}- and -{dtype}-")


def op_speed(op: str, name: str, info: dict[str, Any]) -> OpSpeed:
    """The row that `test_op[OP-CASE-DTYPE-DIRECTION]` comes to; the case may have hyphens."""
    case, dtype, direction = name.removeprefix(f"test_op[{op}-").removesuffix("]").rsplit("-", 2)
    optional = ("times_compiled_rival", "bytes_moved", "bytes_per_second", "share_of_copy_bandwidth")
    return OpSpeed(op, case, dtype, direction, info["seconds"], info["times_rival"], **{name: info.get(name) for name in optional})


def input_pipeline(item: str, settings: Settings, folder: Path) -> list[InputSpeed]:
    """All rivals, then the loader by each backend, with the policy `item`."""
    chosen = "autoaugment" if "autoaugment" in item else "not autoaugment"
    return benchmark_rows(folder, input_speed, "benchmarks/test_input_pipeline.py", "-k", chosen)


def input_speed(name: str, info: dict[str, Any]) -> InputSpeed:
    """The row that `test_rival[RIVAL-POLICY]`, `test_kornia[POLICY]` or `test_loader[BACKEND-POLICY]` comes to."""
    times = {key.removeprefix("times_"): value for key, value in info.items() if key.startswith("times_")}
    pipeline = name.removeprefix("test_").removesuffix("]").replace(f"-{info['policy']}", "").replace(f"[{info['policy']}", "")
    return InputSpeed(
        pipeline.replace("rival[", "").replace("[", " "),
        info["policy"],
        info["device"],
        info["images_per_second"],
        info.get("share_of_copy_bandwidth"),
        times,
    )


def config_of(network: str, batch_size: int, settings: Settings) -> RunConfig:
    """A run of the network that is long enough for whatever is measured of it."""
    engine = EngineConfig(settings.device, compile="off" if settings.smoke else "on")
    return RunConfig(NETWORKS[network], DataConfig("synthetic"), engine=engine, batch_size=batch_size, epochs=100)


def images_for(settings: Settings) -> ImageSet:
    """As many as CIFAR-10 has for a GPU, fewer for a CPU; what they show does not matter to any speed."""
    drawn = synthetic("train")
    count = 64 if settings.smoke else 5_120 if settings.device == "cpu" else len(drawn)
    repeats = 5 if count == len(drawn) else 1
    images, labels = drawn.images[:count].repeat(repeats, 1, 1, 1), drawn.labels[:count].repeat(repeats)
    return ImageSet(images, labels, drawn.classes, drawn.mean, drawn.std)


def training(item: str, settings: Settings, folder: Path) -> list[TrainingSpeed]:
    """A network and a batch size, such as `resnet_prop 128`, and perhaps `deterministic`."""
    network, batch_size, *how = item.split()
    config = config_of(network, int(batch_size), settings)
    config, _ = resolve(replace(config, engine=replace(config.engine, deterministic="deterministic" in how)))
    prepare_machine(config.engine)
    trainer = Trainer(config, images_for(settings))
    print(trainer.compile(), trainer.capture())
    times = []
    for _ in range(1 + (1 if settings.smoke else EPOCHS)):
        start = time.perf_counter()
        trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)
        times.append(time.perf_counter() - start)
    images, count = trainer.steps_per_epoch * config.batch_size, count_network(config.model.arch, **trainer.network["options"])
    rate, chosen = images / median(times[1:]), trainer.config.engine
    return [
        TrainingSpeed(
            network=network,
            batch_size=config.batch_size,
            images=images,
            images_per_second=rate,
            setup_seconds=trainer.seconds["compile"],
            precision=chosen.precision,
            loader=trainer.loader.backend,
            compiled=chosen.compile == "on",
            captured=chosen.capture == "on",
            deterministic=chosen.deterministic,
            flop_utilization=rate * count.training_flops / matmul_flops_per_second(trainer.device, trainer.precision.dtype),
            peak_memory_bytes=peak_memory_bytes(trainer.device),
            parameters=count.parameters,
        )
    ]


def profile(item: str, settings: Settings, folder: Path) -> list[NetworkProfile]:
    """A network at batch size 128."""
    from fastcifar.diagnostics.profile import print_profile

    figures = print_profile(config_of(item, 32 if settings.smoke else 128, settings), 1 if settings.smoke else 16, folder / "profile")
    return [NetworkProfile(item, json.loads(json.dumps(asdict(figures), default=os.fspath)))]


def comparison(item: str, settings: Settings, folder: Path) -> list[Outcome]:
    """All four loops at the batch size that `item` ends in, such as `batch 128`."""
    return compare(task_for(settings.device, int(item.split()[-1]), smoke=settings.smoke))


def time_to_accuracy(item: str, settings: Settings, folder: Path) -> list[Row]:
    """The recipe `item`, with the seed 0."""
    epochs = 1 if settings.smoke else None
    return reproduce([RECIPES[item]], folder / "runs", epochs=epochs, engine=EngineConfig(settings.device))
