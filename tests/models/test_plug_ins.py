"""Networks of timm, of torchvision and of a user's own function, and the sentences where they cannot be had."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from fastcifar.config import ModelConfig
from fastcifar.errors import ConfigError
from fastcifar.models import build_model, check_architecture

MODULE = """
import torch
from torch import nn

def plain(classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, classes))

def torch_named(num_classes=1000):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, num_classes))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 1000))

def nothing():
    return None

def failing(classes):
    raise ValueError("no such luck\\nand more")

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Sets the current folder to one with a module of networks, one that fails and a package."""
    (tmp_path / "my_networks.py").write_text(MODULE)
    (tmp_path / "my_broken_networks.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_networks", "my_package", "my_package.nets"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_networks:torch_named", "my_package.nets:plain"])
def test_functions_in_the_current_folder(name):
    path = list(sys.path)
    model = build_model(name, classes=7, image_size=16)
    assert isinstance(model, nn.Module)
    assert model.training
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks:plian", "my_networks has no function plian"),
        ("my_networks:number", "my_networks has no function number"),
        ("no_networks_here:net", r"cannot be imported \(ModuleNotFoundError: No module named 'no_networks_here'\)"),
        ("my_broken_networks:net", "No module named 'no_such_module_anywhere'"),
        ("my_networks:failing", r"failed for 32x32 images and 10 classes \(ValueError: no such luck\)"),
        ("my_networks:nothing", "my_networks:nothing returned NoneType; expected an nn.Module"),
        ("my_networks:fixed", r"puts out \(2, 1000\) for two images; expected logits of shape \(2, 10\)"),
        ("my_networks:pair", "puts out tuple for two images"),
        ("timm:resnet18_", "unknown network of timm's 'resnet18_'; did you mean resnet18"),
        ("timm:nope", r"unknown network of timm's 'nope'; did you mean (\w+ or ){4}\w+\?"),
        ("torchvision:resnet18_", "unknown network of torchvision's 'resnet18_'; did you mean resnet18"),
        ("torchvision:inception_v3", "torchvision:inception_v3 failed for 32x32 images and 10 classes"),
    ],
)
def test_what_cannot_be_built_is_told_in_a_sentence(name, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name)


@pytest.mark.parametrize("name", ["timm:", "a:b:c", "my networks:net", ":net", "3d:net", "module:"])
def test_names_of_no_known_form_are_refused(name):
    with pytest.raises(ConfigError, match=r"neither timm:NAME, torchvision:NAME nor package\.module:function"):
        check_architecture(name, {})


def test_a_plug_in_reads_no_options():
    assert ModelConfig(arch="my_networks:plain").options == {}
    with pytest.raises(ConfigError, match="my_networks:plain does not read the option 'dropout'"):
        ModelConfig(arch="my_networks:plain", dropout=0.2)


def test_timms_networks_take_small_images():
    for name in ("timm:test_resnet", "timm:test_vit"):
        assert build_model(name, classes=5).eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {}), ("googlenet", {"aux_logits": False, "init_weights": False})]
)
def test_torchvisions_networks_are_its_own_and_put_out_logits_alone(name, options):
    network = build_model(f"torchvision:{name}", classes=7)
    expected = torchvision.models.get_model(name, num_classes=7, **options)
    assert [(key, value.shape) for key, value in network.state_dict().items()] == [
        (key, value.shape) for key, value in expected.state_dict().items()
    ]
    assert network.training
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_torchvisions_transformers_are_told_the_size():
    with torch.device("meta"):
        assert build_model("torchvision:vit_b_16", image_size=48)(torch.zeros(1, 3, 48, 48)).shape == (1, 10)


def test_without_timm_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm:resnet18 needs timm, which is not installed; run pip install timm"):
        build_model("timm:resnet18")
