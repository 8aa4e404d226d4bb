"""FLOPs and activations against closed formulas, and a budget of parameters on the command line."""

import pytest
import torch
from torch import nn

from fastcifar import cli
from fastcifar.models import build_model
from fastcifar.models.count import count_network, saved_bytes


@pytest.mark.parametrize(
    ("name", "training_gflop"), [("resnet20_v2", 0.244), ("resnet_prop", 3.33), ("resnet18", 3.33)]
)
def test_flops_agree_with_the_closed_formula(name, training_gflop):
    count = count_network(name)
    assert count.training_flops / 1e9 == pytest.approx(training_gflop, rel=2e-3)
    stem = count.layers[0]
    assert stem.flops == 2 * 32 * 32 * 27 * stem.output[0]


@pytest.mark.parametrize("name", ["resnet20_v2", "resnext29", "wrn28_2"])
def test_layers_sum_to_the_network_and_training_is_three_passes(name):
    """The gradient of the images is not counted.

    Grouped convolutions count too, whose backward pass PyTorch's own formula overstates.
    """
    count = count_network(name)
    assert sum(layer.parameters for layer in count.layers) == count.parameters
    assert sum(layer.flops for layer in count.layers) == count.forward_flops
    assert count.training_flops == 3 * count.forward_flops - count.layers[0].flops


def test_activations_of_a_small_network_by_hand():
    """Each convolution and norm keeps its input, the linear layer its features; a ReLU's output is the next input."""
    map_, half = 8 * 32 * 32, 6 * 16 * 16
    stem = 3 * 32 * 32 + map_  # the image, and the first norm's input
    first = 3 * map_  # the inputs of two convolutions, and of the norm between them
    second = map_ + map_ + 2 * half  # the sum, which is its norm's input; it halves the map
    pooled = 6
    count = count_network("resnet", blocks=(1, 1), channels=(8, 6), pre_activation=True)
    assert count.activation_bytes == 2 * (stem + first + second + pooled)


def test_saved_integers_keep_their_own_size():
    """A convolution keeps its input, max-pooling its input and an int64 for each value it puts out.

    Without gradients nothing is kept.
    """
    with torch.device("meta"):
        network, images = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2)), torch.empty(2, 3, 8, 8)
    assert saved_bytes(network, images) == 2 * (3 * 64 * 2 + 4 * 64 * 2 + 4 * 16 * 8)
    assert saved_bytes(network.requires_grad_(False), images) == 0


def test_counting_leaves_the_random_state_alone(tmp_path, monkeypatch):
    """A plug-in, which is computed, counts as our own network does, which is not."""
    network = "def net(classes):\n    return build_model('resnet', blocks=(1,), channels=(4,), classes=classes)\n"
    (tmp_path / "a_small_network.py").write_text(f"from fastcifar.models import build_model\n{network}")
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    plugged, own = count_network("a_small_network:net"), count_network("resnet", blocks=(1,), channels=(4,))
    assert torch.equal(torch.get_rng_state(), state)
    assert plugged == own


def test_a_network_with_attention_counts():
    count = count_network("timm:test_vit")
    assert count.parameters == sum(parameter.numel() for parameter in build_model("timm:test_vit").parameters())
    assert sum(layer.parameters for layer in count.layers) == count.parameters
    assert all(layer.flops >= 0 for layer in count.layers)


def test_max_params_refuses_a_larger_network(capsys):
    assert cli.main("count --arch resnet20_v2 --max-params 272154".split()) == 0
    assert "272,154 parameters" in " ".join(capsys.readouterr().out.split())
    assert cli.main("count --arch resnet20_v2 --max-params 272153".split()) == 2
    assert "the network has 272,154 parameters, above max_params 272,153" in capsys.readouterr().err


def test_the_table_has_the_sum_of_each_stage(capsys):
    """Report 1's first stack has four convolutions of 9 * 64 * 64 weights; each has a norm of 2 * 64."""
    assert cli.main(["count", "--arch", "resnet_prop"]) == 0
    sums = {line.split()[0]: line.split()[2:] for line in capsys.readouterr().out.splitlines() if " sum " in line}
    assert list(sums) == ["stage1", "stage2", "stage3", "stage4"]
    assert sums["stage1"] == [f"{4 * (9 * 64 * 64 + 2 * 64):,}", f"{4 * 2 * 9 * 64 * 64 * 32 * 32 / 1e6:.2f}"]
