"""The parts of the suite: what each consists of, what it needs, and the kind of its rows."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparison import Outcome

from fastcifar.analysis.results import Row
from fastcifar.config import ModelConfig
from fastcifar.data.sources import find
from fastcifar.kernels.spec import all_specs
from fastcifar.models.count import count_network
from fastcifar.recipes import RECIPES, select
from suite.networks import NETWORKS
from suite.records import InputSpeed, NetworkProfile, OpSpeed, PackedSpeed, Settings, TestFile, TrainingSpeed

ROOT = Path(__file__).resolve().parents[2]
GPU, CIFAR = "a GPU", "CIFAR-10"
DALI, RIVALS = "nvidia.dali", ("kornia", "albumentations")
POLICIES = ("standard", "standard,autoaugment_tv")
DETERMINISTIC = ("resnet20_v2", "resnet_prop")
"""Networks of which it is measured what deterministic algorithms cost."""
PACKED = ("resnet20_v2", "resnet_prop")
"""Networks of which several are trained at a time."""
DTYPES = ("bfloat16", "float32", "float16", "uint8")
"""Of the kernels, the one that training uses first."""


@dataclass(frozen=True)
class Part:
    """One file of results. Its items are measured one by one, each in a process of its own."""

    name: str
    summary: str
    row: type
    """Dataclass of a row."""
    target: str
    """`module:function` that measures an item: (item, settings, folder for whatever it leaves) -> rows."""
    items: Callable[[Settings], list[str]]
    needs: tuple[str, ...] = ()
    """Modules, `GPU` or `CIFAR`, without which it is skipped."""
    uses: tuple[str, ...] = ()
    """The same, without which rows are missing."""
    cost: Callable[[str], float] | None = None
    """How the items' times relate, where that is known; cheap items come first then."""

    def chosen(self, settings: Settings) -> list[str]:
        """The items that `settings` ask for."""
        return self.items(settings)[: 1 if settings.smoke else None]


def absence(name: str, settings: Settings) -> str | None:
    """Why something that a part needs is not there, or None."""
    if name == GPU:
        return "the CPU was chosen" if settings.device == "cpu" else None
    if name == CIFAR:
        return None if find("cifar10") else "it is not at hand; name its folder in FASTCIFAR_DATA"
    try:
        there = importlib.util.find_spec(name) is not None
    except ImportError:
        there = False
    return None if there else "it cannot be imported; install it, or name its folder in PYTHONPATH"


def missing(names: tuple[str, ...], settings: Settings) -> dict[str, str]:
    """Those of `names` that are not there, and why."""
    return {name: why for name in names if (why := absence(name, settings))}


def gpu_test_files(settings: Settings) -> list[str]:
    """Files with tests that need a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text("utf-8")]


def ops_by_dtype(settings: Settings) -> list[str]:
    """On a CPU the benchmark has only each op's first dtype."""
    specs = [(spec.name, [str(dtype).removeprefix("torch.") for dtype in spec.dtypes]) for spec in all_specs()]
    if settings.device == "cpu":
        return [f"{name} {dtypes[0]}" for name, dtypes in specs]
    return [f"{name} {dtype}" for dtype in DTYPES for name, dtypes in specs if dtype in dtypes]


def networks_by_batch_size(settings: Settings) -> list[str]:
    """At the smallest size some also with deterministic algorithms."""
    sizes = (32,) if settings.smoke else (128,) if settings.device == "cpu" else (128, 512)
    deterministic = [f"{network} {sizes[0]} deterministic" for network in DETERMINISTIC]
    return [f"{network} {size}" for size in sizes for network in NETWORKS] + deterministic


def networks_by_way(settings: Settings) -> list[str]:
    """On a CPU there are no streams."""
    ways = ("processes",) if settings.device == "cpu" else ("processes", "streams")
    return [f"{network} {way}" for network in PACKED for way in ways]


def batch_sizes(settings: Settings) -> list[str]:
    return ["batch 32"] if settings.smoke else ["batch 128"] if settings.device == "cpu" else ["batch 128", "batch 512"]


def recipes_by_cost(settings: Settings) -> list[str]:
    """Cheapest first; `quickstart` alone where it is only to be seen to run."""
    return ["quickstart"] if settings.smoke else sorted((entry.name for entry in select(settings.recipes)), key=cost_of)


@functools.cache
def cost_of(recipe: str) -> float:
    """FLOPs an image, epochs and passes a step together."""
    config = RECIPES[recipe].config
    return training_flops(config.model) * config.epochs * (1 if config.optim.sharpness == "none" else 2)


@functools.cache
def training_flops(model: ModelConfig) -> int:
    return count_network(model.arch, **model.options).training_flops


PYTEST_BENCHMARK = "pytest_benchmark"
ALL = (
    Part(
        "correctness", "the tests that need a GPU", TestFile, "suite.measures:correctness", gpu_test_files, ("pytest", GPU), (DALI, CIFAR)
    ),
    Part("kernels", "the speed of each op", OpSpeed, "suite.measures:kernels", ops_by_dtype, (PYTEST_BENCHMARK,)),
    Part(
        "input_pipeline",
        "augmented images a second, against other libraries",
        InputSpeed,
        "suite.measures:input_pipeline",
        lambda settings: list(POLICIES),
        (PYTEST_BENCHMARK,),
        (DALI, *RIVALS),
    ),
    Part("training", "training speed of each network", TrainingSpeed, "suite.measures:training", networks_by_batch_size, (), (DALI,)),
    Part("packed", "several runs on one device, against one", PackedSpeed, "suite.packed:packed", networks_by_way, (), (DALI,)),
    Part("profiles", "where each network's time goes", NetworkProfile, "suite.measures:profile", lambda settings: list(NETWORKS)),
    Part(
        "comparison",
        "fastcifar against three plain loops",
        Outcome,
        "suite.measures:comparison",
        batch_sizes,
        ("torchvision",),
        (DALI, CIFAR),
    ),
    Part(
        "time_to_accuracy",
        "whole runs of recipes, cheapest first",
        Row,
        "suite.measures:time_to_accuracy",
        recipes_by_cost,
        (CIFAR,),
        (DALI,),
        cost_of,
    ),
)
PARTS = {part.name: part for part in ALL}
