"""The network of a run: which weights, and nothing executed that is not trusted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from small_run import CLASSES, MEAN, SIZE, STD, make_run, make_weights

from fastcifar.augment.normalize import Normalization
from fastcifar.errors import FastcifarError
from fastcifar.inference.evaluate import evaluate_run
from fastcifar.inference.export import export_run
from fastcifar.inference.predict import write_predictions
from fastcifar.runs.network import read_network

CPU = torch.device("cpu")
PLUG_IN = """
from pathlib import Path
from torch import nn
Path({marker!r}).touch()


def build(classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, classes))
"""


def test_the_network_is_as_it_was_stored(run: Path) -> None:
    network = load_network(run, CPU, "weights")
    assert (network.classes, network.image_size, network.weights, network.arch) == (CLASSES, SIZE, "weights", "resnet")
    assert network.normalization == Normalization(MEAN, STD)
    assert not network.model.training
    for name, tensor in make_weights(0).items():
        assert torch.equal(network.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("averages", "accuracies", "expected"),
    [
        ((), {}, "weights"),
        (("ema-0.999", "swa"), {}, "ema-0.999"),
        (("ema-0.999",), {"weights": 0.8, "ema-0.999": 0.7}, "weights"),
        (("ema-0.999", "swa"), {"weights": 0.8, "ema-0.999": 0.7, "swa": 0.9}, "swa"),
        (("ema-0.999",), {"weights": 0.8, "ema-0.999": 0.8}, "ema-0.999"),
    ],
)
def test_which_weights_are_taken(
    tmp_path: Path, averages: tuple[str, ...], accuracies: dict[str, float], expected: str
) -> None:
    best = {name: {"epoch": 1, "accuracy": accuracy, "loss": 1.0} for name, accuracy in accuracies.items()}
    network = load_network(make_run(tmp_path / "run", tmp_path / "data.npz", averages=averages, best=best), CPU)
    assert network.weights == expected
    seed = ("weights", *averages).index(expected)
    stored = make_weights(list(accuracies).index(expected) + 100 if accuracies else seed)
    assert torch.equal(network.model.state_dict()["stem.weight"], stored["stem.weight"])


@pytest.mark.parametrize("averages", [(), ("swa",)])
def test_a_snapshot_is_taken_by_its_name_alone(tmp_path: Path, averages: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run", tmp_path / "data.npz", averages=averages, snapshots=2)
    assert load_network(run, CPU).weights == ("swa" if averages else "weights")
    network = load_network(run, CPU, "snapshot-2")
    assert torch.equal(network.model.state_dict()["stem.weight"], make_weights(2 + len(averages))["stem.weight"])


def test_weights_that_the_run_lacks(run: Path) -> None:
    with pytest.raises(FastcifarError, match=re.escape(f"{run}: unknown weights 'ema-0.99'; did you mean ema-0.999?")):
        load_network(run, CPU, "ema-0.99")


@pytest.mark.parametrize("size", [0, 10**9, "8", None, True])
def test_an_impossible_image_size(tmp_path: Path, data: Path, size: object) -> None:
    run = make_run(tmp_path / "other", data, options={"blocks": [1], "channels": [4], "image_size": size})
    with pytest.raises(FastcifarError, match="which cannot be; start the run again"):
        load_network(run, CPU)


@pytest.fixture
def plug_in(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run whose network is built by a module of its own, and the file that the module makes when it is imported."""
    marker = tmp_path / "executed"
    (tmp_path / "strangers_net.py").write_text(PLUG_IN.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_net", raising=False)
    return make_run(tmp_path / "run", data, arch="strangers_net:build", options={"image_size": SIZE}), marker


@pytest.mark.parametrize(
    "use",
    [
        lambda run, data: load_network(run, CPU),
        lambda run, data: evaluate_run(run),
        lambda run, data: write_predictions([run], data, run.parent / "out.csv"),
        lambda run, data: export_run(run, "torch"),
    ],
    ids=["load", "eval", "predict", "export"],
)
def test_a_strangers_code_is_not_executed(plug_in: tuple[Path, Path], data: Path, use) -> None:
    run, marker = plug_in
    with pytest.raises(
        FastcifarError, match=r"'strangers_net:build', code that comes with the run and would be executed; add --trust"
    ):
        use(run, data)
    assert not marker.exists()
    assert not (run.parent / "out.csv").exists()


def test_trusted_code_is(plug_in: tuple[Path, Path]) -> None:
    run, marker = plug_in
    with pytest.raises(FastcifarError, match=r"'s ema-0\.999 "):  # the stored weights are another network's
        load_network(run, CPU, trust=True)
    assert marker.exists()


@pytest.mark.parametrize(
    "arch", ["timm:hf-hub:someone/net", "timm:local-dir:/tmp/net", "timm:../net", "os:system", "a.b:c", "resnet\n"]
)
def test_what_would_fetch_or_import_is_refused(tmp_path: Path, data: Path, arch: str) -> None:
    with pytest.raises(FastcifarError, match="add --trust"):
        load_network(make_run(tmp_path / "other", data, arch=arch), CPU)
