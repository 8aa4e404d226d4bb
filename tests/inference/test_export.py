"""Exports give the same probabilities without fastcifar, or no file; and the model card beside them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_run import CLASSES, VOTERS, images_like, logits_of, make_run, mean_of_voters, small_network
from small_training import CONFIG

from fastcifar import cli
from fastcifar.data.image_set import ImageSet
from fastcifar.data.sources import load_dataset
from fastcifar.engine.run import train
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.inference import export, formats
from fastcifar.inference.card import escaped
from fastcifar.inference.evaluate import evaluate_run
from fastcifar.inference.export import export_run
from fastcifar.inference.formats import FORMATS
from fastcifar.inference.predict import predict
from fastcifar.runs.network import read_network

LACKING = {
    name: [package for package in made.packages if not importlib.util.find_spec(package)]
    for name, made in FORMATS.items()
}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(lacking), reason=f"no {', '.join(lacking)}"))
    for name, lacking in LACKING.items()
]

STRANGER = """
import os
import sys
sys.modules["fastcifar"] = None
sys.path.insert(0, "")
import numpy as np
import torch
for folder in {folders!r}:
    os.chdir(folder)
    sys.modules.pop("model_network", None)
    found = {{}}
    for count in (1, 2, 13):
        images = np.load("images.npy")[:count]
        images = images if {onnx} else torch.from_numpy(images)
        exec({usage!r})
        assert probabilities.dtype == (np.float32 if {onnx} else torch.float32)
        found[str(count)] = np.asarray(probabilities)
    np.savez("found.npz", **found)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_gets_the_same_probabilities(run: Path, ensemble: Path, name: str) -> None:
    """Runs the model card's code in a process without fastcifar; an ensemble answers with the mean of its voters."""
    suffix, images = FORMATS[name].suffix, images_like(13, seed=9)
    for folder, weights in ((run, "ema-0.999"), (ensemble, "2 networks")):
        made = export_run(folder, name)
        assert made.check.difference <= 1e-5
        assert (made.weights, str(made.check)) == (weights, "the first 64 test images of data.npz")
        assert folder / f"model{suffix}" in made.files
        np.save(folder / "images.npy", images)
    usage = (run / f"model{suffix}.md").read_text().split("```python\n")[1].split("```")[0]
    program = STRANGER.format(folders=[str(run), str(ensemble)], usage=usage, onnx=name == "onnx")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, expected in ((run, logits_of(run, images).softmax(1)), (ensemble, mean_of_voters(ensemble, images))):
        found = np.load(folder / "found.npz")
        for count in (1, 2, 13):
            np.testing.assert_allclose(found[str(count)], expected[:count], atol=1e-5)
        assert not list(folder.glob(".model*"))


def test_the_card_of_an_ensemble(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(ensemble), "--format", "safetensors"]) == 0
    assert capsys.readouterr().out.startswith("2 networks: equal to within ")
    with safe_open(ensemble / "model.safetensors", "pt") as file:
        members = json.loads(file.metadata()["members"])
    assert [one["weights"] for one in members] == [which for _, which in VOTERS]
    card = (ensemble / "model.safetensors.md").read_text()
    parameters = sum(parameter.numel() for parameter in small_network().parameters())
    for text in (
        "# Ensemble of 2 on data.npz",
        f"{2 * parameters:,} parameters together",
        f"| seed0 | ema-0.999 | resnet | {parameters:,} |",
        f"| seed2 | weights | resnet | {parameters:,} |",
        "| seed | 0, 2 |",
        "| batch size | 128 |",
        "| test accuracy of this file, in fp32 |",
        "| test accuracy of the vote | 50.00% |",
        "| mean test accuracy of its members | 25.00% |",
    ):
        assert text in card
    assert str(ensemble.parent) not in card


def test_the_command_and_the_card_of_a_run(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both state the accuracy of the file, and how many classes change in another precision."""
    test = load_dataset(str(data), "test")
    given = predict(run, test.images).labels
    differing = int((given != predict(run, test.images, precision="bf16").labels).sum())
    accuracy = f"{100 * (given == test.labels).double().mean():.2f}%"
    assert cli.main(["export", str(run), "--format", "torch", "--weights", "ema-0.999", "--precision", "bf16"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("ema-0.999: equal to within ")
    assert lines == [
        f"test accuracy of the file: {accuracy} of 70 images, computed in fp32",
        f"In bf16 the run gives another class to {differing} of them.",
        str(run / "model.pt2"),
        str(run / "model.pt2.md"),
    ]
    card = (run / "model.pt2.md").read_text()
    for text in (
        "the average ema-0.999 of the weights",
        f"| test accuracy of this file, in fp32 | {accuracy} |\n| 95% interval |",
        f"| test images that fastcifar classifies differently in bf16 | {differing} of 70 |",
        "| batch size | 128 |",
    ):
        assert text in card
    assert str(run.parent) not in card


def test_the_check_takes_real_images_however_few(run: Path, data: Path) -> None:
    few = load_dataset(str(data), "test").subset(torch.arange(3))
    check = export_run(run, "safetensors", test_set=few).check
    assert (str(check), check.score.images) == ("the first 3 test images of the set given", 3)
    with pytest.raises(FastcifarError, match="trained on other classes than test_set has"):
        export_run(run, "safetensors", test_set=replace(few, classes=("a", "b", "c")))


def test_tiny_images_from_training_to_the_export(tmp_path: Path) -> None:
    images, labels = torch.from_numpy(images_like(48, size=4)), np.arange(48) % 3
    train_set, test_set = (ImageSet.of(images[part], labels[part]) for part in (slice(40), slice(40, None)))
    train(CONFIG, tmp_path / "run", train_set=train_set, test_set=test_set)
    assert evaluate_run(tmp_path / "run", test_set=test_set, tta="mirror-shift").score.images == 8
    assert len(predict(tmp_path / "run", images).labels) == 48
    assert export_run(tmp_path / "run", "safetensors", test_set=test_set).check.score.images == 8


def test_text_from_files_is_harmless_in_the_card(ensemble: Path, data: Path) -> None:
    names = ["<script>", "a | b", "[x](y)\x1b[31m\n# *z*", "\udcff"]
    run = make_run(ensemble / "`<b>`", data, classes=names[:3])
    card = export_run(run, "safetensors").files[1].read_text()
    assert r"order: \<script\>, a \| b, \[x\](y)\\x1b\[31m\\n# \*z\*." in card
    assert escaped(f"{names[3]} _a_ __b__ resnet_prop") == r"\\udcff \_a\_ \_\_b\_\_ resnet_prop"


def test_images_that_were_given_and_others_that_are_gone(tmp_path: Path, data: Path) -> None:
    run, gone = make_run(tmp_path / "run", "given", arch="given"), make_run(tmp_path / "gone", tmp_path / "gone.npz")
    made = export_run(run, "torch", model=small_network(), test_set=load_dataset(str(data), "test"))
    assert str(made.check) == "the first 64 test images of the set given"
    assert "# a network given in Python on images given in Python" in (run / "model.pt2.md").read_text()
    assert str(export_run(gone, "torch").check) == "64 random images, since gone.npz as the run had it was not at hand"


def test_what_goes_with_safetensors(run: Path) -> None:
    made = export_run(run, "safetensors", which="weights")
    assert sorted(file.name for file in made.files) == ["model.safetensors", "model.safetensors.md", "model_network.py"]
    with safe_open(run / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert file.metadata()["weights"] == "weights"
        stem = file.get_tensor("network.stem.weight")
    model = read_network(run).load(torch.device("cpu"), "weights").model
    assert torch.equal(stem, model.state_dict()["stem.weight"])


@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_only_bytes_are_taken_and_on_any_device(run: Path, name: str) -> None:
    path = export_run(run, name).files[0]
    classify = FORMATS[name].open(path)
    with pytest.raises((RuntimeError, AssertionError)):
        classify(torch.zeros(2, 8, 8, 3))
    if name == "safetensors":
        module = formats.runpy.run_path(str(formats.module_beside(path)))
        weights = {key: tensor.to("meta") for key, tensor in module["load"](path).items()}
        assert module["classify"](weights, torch.zeros(5, 8, 8, 3, dtype=torch.uint8, device="meta")).shape == (5, 3)


def test_class_names_cannot_become_code(tmp_path: Path, data: Path) -> None:
    names = ['"""', "'); import os; os.abort() #", "{body}\n```"]
    run = make_run(tmp_path / "hostile", data, classes=names)
    export_run(run, "safetensors", run / "1 net-a.safetensors")
    spec = importlib.util.spec_from_file_location("hostile", run / "_1_net_a_network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert names == module.CLASSES


def test_an_export_that_differs_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS["safetensors"]
    off = replace(whole, open=lambda path: lambda images: whole.open(path)(images) + 2e-5)
    monkeypatch.setitem(formats.FORMATS, "safetensors", off)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(FastcifarError, match=r"gave probabilities off by 2\.\de-05, more than 1e-05, and was not kept"):
        export_run(run, "safetensors")
    assert sorted(path.name for path in run.iterdir()) == before


def test_operations_that_plain_torch_lacks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.library._scoped_library("strangers_ops", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        whole, twice = export.Deployed.forward, torch.ops.strangers_ops.twice
        monkeypatch.setattr(export.Deployed, "forward", lambda self, images: twice(whole(self, images)))
        with pytest.raises(FastcifarError, match=r"operations that plain torch lacks, strangers_ops\.twice"):
            export_run(run, "torch")


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"does not end in \.pt2"):
        export_run(run, "torch", tmp_path / "net.onnx")
    with pytest.raises(FastcifarError, match="cannot be written"):
        export_run(run, "torch", tmp_path / "nowhere" / "net.pt2")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"needs onnx, onnxscript, onnxruntime; pip install 'fastcifar\[export\]'"):
        export_run(run, "onnx")
