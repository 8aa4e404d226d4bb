"""The Python interface: recipes by name, a user's own networks and images, errors that name arguments."""

import numpy as np
import pytest
import torch
from small_training import CONFIG, image_set
from torch import nn

import fastcifar
from fastcifar.api import speaks_of_arguments
from fastcifar.errors import ConfigError

IMAGES = {"train_set": image_set(100), "test_set": image_set(40, seed=1)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Replaces what takes most of the time of runs so short, and is tested elsewhere."""
    monkeypatch.setattr("fastcifar.engine.run.draw_curves", lambda run, console: None)
    monkeypatch.setattr("fastcifar.engine.run.matmul_flops_per_second", lambda device, dtype: 1e12)


class Pooled(nn.Module):
    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, features, 3)
        self.norm = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.convolution(x)).relu().mean((2, 3)))


def test_a_recipe_by_name_with_settings(monkeypatch):
    monkeypatch.setattr("fastcifar.engine.run.train", lambda config, out, **given: config)
    config = fastcifar.train("quickstart", epochs=2, lr=0.05)
    assert (config.recipe, config.epochs, config.optim.lr, config.model.blocks) == ("quickstart", 2, 0.05, (1, 1, 1))
    other = fastcifar.train("quickstart", arch="resnet20_v2", optimizer="adamw")
    assert (other.model.options, other.optim.resolved.lr) == ({}, 3e-3), "the recipe's own do not suit these"


def test_a_network_of_ones_own_is_trained_evaluated_and_resumed(tmp_path):
    torch.manual_seed(0)
    model, run = Pooled(), tmp_path / "run"
    before = model.head.weight.clone()
    result = fastcifar.train(CONFIG, run, model=model, **IMAGES)
    assert not torch.equal(model.head.weight, before)
    assert result.parameters == sum(parameter.numel() for parameter in Pooled().parameters())
    images = IMAGES["test_set"].images
    with torch.no_grad():
        x = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        expected = model.eval()(x).double().softmax(dim=1)
    predictions = fastcifar.predict(run, images, which="weights", model=Pooled())
    torch.testing.assert_close(predictions.probabilities, expected, rtol=1e-4, atol=1e-5)
    assert predictions.classes == IMAGES["test_set"].classes
    accuracy = (expected.argmax(1) == IMAGES["test_set"].labels).double().mean().item()
    report = fastcifar.evaluate(run, which="weights", model=Pooled(), test_set=IMAGES["test_set"])
    assert report.score.accuracy == result.test_accuracy == accuracy
    fastcifar.resume(run, epochs=3, model=Pooled(), **IMAGES)
    for call in (lambda: fastcifar.predict(run, images), lambda: fastcifar.resume(run, epochs=4, **IMAGES)):
        with pytest.raises(fastcifar.FastcifarError, match="give it again in Python, as model="):
            call()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Flatten(), r"model=Flatten\(\.\.\.\) puts out \(2, 768\)"),
        (nn.Linear(7, 5), r"model=Linear\(\.\.\.\) failed for 16x16 images"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_network_that_does_not_classify_is_refused(tmp_path, model, expected):
    with pytest.raises(ConfigError, match=expected):
        fastcifar.train(CONFIG, tmp_path / "run", model=model, **IMAGES)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: fastcifar.train(epoch=3), "unknown setting 'epoch'; did you mean epochs"),
        (lambda: fastcifar.train("quickstar"), "did you mean quickstart?"),
        (lambda: fastcifar.train(batch_size=500, dataset="synthetic", lr=-1.0), "lr is -1.0; expected above 0."),
        (lambda: fastcifar.train(CONFIG, batch_size=101, **IMAGES), "the 100 training images; lower batch_size."),
        (lambda: fastcifar.resume("nowhere"), "nowhere is no run"),
    ],
)
def test_errors_speak_of_arguments(call, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastcifar.FastcifarError) as caught:
        call()
    assert expected in str(caught.value)
    assert "--" not in str(caught.value)


def test_flags_become_arguments_with_their_numbers():
    @speaks_of_arguments
    def refused() -> None:
        raise ConfigError("lower --lr, or bound it with --clip-norm 1, or add --teacher RUN -- or both.")

    expected = r"^lower lr, or bound it with clip_norm=1, or add teacher RUN -- or both\.$"
    with pytest.raises(ConfigError, match=expected):
        refused()


def test_what_is_public_is_there():
    for name in fastcifar.__all__:
        assert getattr(fastcifar, name) is not None
    assert set(dir(fastcifar)) == set(fastcifar.__all__)


def test_a_set_is_shown_in_one_line_and_a_loader_takes_the_device_there_is():
    images = fastcifar.ImageSet.of(np.zeros((4, 8, 6, 3), np.uint8), [0, 1, 0, 1])
    assert repr(images) == "ImageSet(4 images of 6x8, 2 classes, on cpu)"
    loader = fastcifar.Loader(image_set(20), batch_size=10)
    assert loader.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
