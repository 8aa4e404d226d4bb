"""The network of a run: which weights are taken, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import CLASSES, MEAN, SIZE, STD, images_like, make_run, make_weights

from fastcifar.augment.normalize import Normalization
from fastcifar.data.image_set import ImageSet
from fastcifar.errors import FastcifarError
from fastcifar.runs.folder import Run
from fastcifar.runs.network import TrainedNetwork, read_network


def load(run: Path, which: str | None = None) -> TrainedNetwork:
    return read_network(run).load(torch.device("cpu"), which)


def test_the_network_is_as_it_was_stored(tmp_path: Path) -> None:
    network = load(make_run(tmp_path / "run", "data.npz"), "weights")
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
    """A snapshot is taken only where it is named."""
    best = {name: {"epoch": 1, "accuracy": accuracy, "loss": 1.0} for name, accuracy in accuracies.items()}
    run = make_run(tmp_path / "run", "data.npz", averages=averages, best=best, snapshots=2)
    network = load(run)
    assert network.weights == expected
    seed = list(accuracies).index(expected) + 100 if accuracies else ("weights", *averages).index(expected)
    assert torch.equal(network.model.state_dict()["stem.weight"], make_weights(seed)["stem.weight"])
    snapshot = load(run, "snapshot-2").model.state_dict()
    assert torch.equal(snapshot["stem.weight"], make_weights(2 + len(averages))["stem.weight"])


def test_a_network_knows_the_images_of_its_run(tmp_path: Path) -> None:
    own, other = (ImageSet.of(images_like(4, seed=seed), [0, 1, 2, 0], CLASSES) for seed in (0, 1))
    network = load(make_run(tmp_path / "run", "data.npz", images={"test": own.digest()}))
    assert (network.knows("test", own), network.knows("test", other)) == (True, False)
    assert network.knows("train", own) is None


def test_weights_that_the_run_lacks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "data.npz")
    with pytest.raises(FastcifarError, match=re.escape(f"{run}: unknown weights 'ema-0.99'; did you mean ema-0.999?")):
        load(run, "ema-0.99")


@pytest.mark.parametrize("size", [0, 10**9, "8", None, True])
def test_an_impossible_image_size(tmp_path: Path, size: object) -> None:
    run = make_run(tmp_path / "run", "data.npz", options={"blocks": [1], "channels": [4], "image_size": size})
    with pytest.raises(FastcifarError, match="which cannot be; start the run again"):
        load(run)


@pytest.mark.parametrize(
    "arch", ["timm:hf-hub:someone/net", "timm:local-dir:/tmp/net", "timm:../net", "os:system", "a.b:c", "resnet\n"]
)
def test_what_would_fetch_or_import_is_refused(tmp_path: Path, arch: str) -> None:
    with pytest.raises(FastcifarError, match="add --trust"):
        load(make_run(tmp_path / "run", "data.npz", arch=arch))


def test_swas_weights_are_not_taken_before_the_run_has_ended(tmp_path: Path) -> None:
    """They may be the first weights still, and their batch norm statistics are measured at the end."""
    run = Run(make_run(tmp_path / "run", "data.npz", averages=("swa",)))
    assert load(run.path).weights == "swa"
    run.write_config(replace(run.config(), epochs=3))
    assert load(run.path).weights == "weights"
    with pytest.raises(FastcifarError, match="unknown weights 'swa'"):
        load(run.path, "swa")
