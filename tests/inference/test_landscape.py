"""The loss around a run's weights: against moving the weights by hand, and its refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import logits_of
from torch.nn import functional as F

from fastcifar.data.sources import load_dataset
from fastcifar.errors import ConfigError
from fastcifar.inference.landscape import Grid, draw_landscapes, filter_normalized, loss_surface
from fastcifar.models import build_model
from fastcifar.runs import checkpoint as checkpoints
from fastcifar.runs.network import read_network

CPU = torch.device("cpu")


def test_the_middle_is_the_loss_of_the_run(run: Path, data: Path, tmp_path: Path) -> None:
    (landscape,) = draw_landscapes([run], tmp_path / "a.png", Grid(points=3), images=10**6)
    train = load_dataset(str(data), "train")
    expected = F.cross_entropy(logits_of(run, train.images, "ema-0.999").double(), train.labels)
    assert landscape.centre == pytest.approx(expected.item(), rel=1e-5)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["losses"] == {str(run): landscape.losses.tolist()}
    assert stored["places"] == [-1, 0, 1]


def test_places_are_steps_along_both_directions(run: Path, data: Path) -> None:
    network, train, grid = read_network(run).load(CPU), load_dataset(str(data), "train"), Grid(3, 0.5, seed=3)
    before = {name: parameter.clone() for name, parameter in network.model.named_parameters()}
    losses = loss_surface(network, train.images[:20], train.labels[:20], CPU, grid)
    assert all(torch.equal(before[name], parameter) for name, parameter in network.model.named_parameters())
    first, second = filter_normalized(network.model, 3), filter_normalized(network.model, 4)
    moved = {name: before[name] - 0.5 * first[name] + 0.5 * second[name] for name in before}
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (network.normalization.mean, network.normalization.std)
    )
    x = (train.images[:20].permute(0, 3, 1, 2) / 255 - mean) / std
    expected = F.cross_entropy(torch.func.functional_call(network.model, moved, (x,)), train.labels[:20])
    assert losses[0, 2].item() == pytest.approx(expected.item(), rel=1e-4)


def test_each_filter_of_a_direction_is_as_long_as_the_weights() -> None:
    model = build_model("resnet", blocks=(1, 1), channels=(4, 6))
    direction = filter_normalized(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert not direction[name].any(), name
        else:
            lengths = [tensor.flatten(1).norm(dim=1) for tensor in (direction[name], parameter)]
            torch.testing.assert_close(*lengths)
    assert not torch.equal(direction["stem.weight"], filter_normalized(model, seed=1)["stem.weight"])


def test_bad_grids_and_names_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="points is 4; give an odd number"):
        Grid(points=4)
    with pytest.raises(ConfigError, match="radius is 0; expected above 0"):
        Grid(radius=0)
    with pytest.raises(ConfigError, match=r"a\.pdf is no name of a \.png file"):
        draw_landscapes([run], "a.pdf")


def test_images_that_have_changed_are_told(run: Path, data: Path, tmp_path: Path) -> None:
    train = load_dataset(str(data), "train")
    checkpoint = checkpoints.load(run / "checkpoints")
    progress = {**checkpoint.progress, "step": checkpoint.progress["step"] + 1, "images": {"train": train.digest()}}
    checkpoints.save(run / "checkpoints", replace(checkpoint, progress=progress))
    grid = Grid(points=3)
    assert not draw_landscapes([run], tmp_path / "a.png", grid, images=5)[0].changed
    (changed,) = draw_landscapes([run], tmp_path / "a.png", grid, images=5, train_set=train.subset(torch.arange(9)))
    assert changed.changed
