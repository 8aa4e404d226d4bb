"""Losses against timm's, torch's and closed forms, and learning from run folders."""

import math
from pathlib import Path

import pytest
import torch
from made_run import make_run
from small_run import CLASSES, images_like, make_ensemble, mean_of_voters
from timm.loss import AsymmetricLossSingleLabel
from torch import nn
from torch.nn import functional as F

from fastcifar.config import DataConfig, EngineConfig, LossConfig, ModelConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.objective import asymmetric, build_loss, cross_entropy, distillation, load_teacher
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.runs.network import read_network

CPU = torch.device("cpu")


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(7), dtype=dtype)
    return logits.requires_grad_(), torch.arange(7) % 5


@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "smoothing"), [(0, 4, 0.1), (0, 0, 0), (1, 2, 0), (2, 4, 0.3)])
def test_asymmetric_equals_timms_in_value_and_gradient(gamma_pos, gamma_neg, smoothing):
    logits, labels = batch(dtype=torch.float32)
    theirs_in = logits.detach().clone().requires_grad_()
    ours = asymmetric(logits, labels, gamma_pos, gamma_neg, smoothing)
    theirs = AsymmetricLossSingleLabel(gamma_pos, gamma_neg, eps=smoothing)(theirs_in, labels)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, theirs_in.grad)


def test_asymmetric_takes_shares():
    """A one-hot share is a label; the focus of a mixed one is mixed."""
    logits, labels = batch()
    one_hot = F.one_hot(labels, 5).float()
    torch.testing.assert_close(asymmetric(logits, one_hot, 0, 4, 0.1), asymmetric(logits, labels, 0, 4, 0.1))
    p = torch.tensor([[0.25, 0.75]])
    expected = -(0.5 * (0.5 * (1 - p) ** 1 + 0.5 * p**2) * p.log()).sum()
    torch.testing.assert_close(asymmetric(p.log(), torch.tensor([[0.5, 0.5]]), 1, 2, 0.0), expected)


def test_asymmetric_is_finite_at_the_ends():
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]], requires_grad=True)
    loss = asymmetric(logits, torch.tensor([0, 0]), 0, 4, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_build_loss_reads_the_configuration():
    logits, labels = batch(dtype=torch.float32)
    for config, expected in (
        (LossConfig(), cross_entropy(logits, labels)),
        (LossConfig(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)),
        (LossConfig("asymmetric"), AsymmetricLossSingleLabel(0, 4, 0.1)(logits, labels)),
        (LossConfig("asymmetric", label_smoothing=0.0, gamma_neg=2.0), asymmetric(logits, labels, 0, 2, 0)),
    ):
        torch.testing.assert_close(build_loss(config)(logits, labels), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma_neg": 2.0}, "cross-entropy does not read gamma_neg"),
        ({"temperature": 2.0}, "add --teacher RUN"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"loss": "asymmetric", "gamma_neg": 0.5}, "gamma_neg is 0.5, which gives the loss an infinite slope"),
        ({"loss": "asymmetric", "gamma_pos": 0.5}, "gamma_pos is 0.5, which gives the loss an infinite slope"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)


def test_distillation_closed_form():
    """With two classes it is the KL of Bernoulli distributions at softened probabilities, times temperature squared."""
    student, teacher, temperature = 1.3, -0.4, 2.5
    q, p = (1 / (1 + math.exp(-value / temperature)) for value in (student, teacher))
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) * temperature**2
    found = distillation(torch.tensor([[student, 0.0]]), torch.tensor([[teacher, 0.0]]), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def image_set(*classes: str) -> ImageSet:
    images = torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(12) % len(classes), classes, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def student_of(teacher: Path, *classes: str, **loss: float) -> Trainer:
    config = RunConfig(
        model=ModelConfig("resnet", blocks=(1,), channels=(4,)),
        data=DataConfig(loader="torch", chunk_size=12),
        loss=LossConfig(teacher=teacher, **loss),
        engine=EngineConfig(device="cpu", precision="fp32", compile="off"),
        epochs=1,
        batch_size=4,
    )
    return Trainer(config, image_set(*classes))


def seen_by_teacher(images: torch.Tensor) -> torch.Tensor:
    """Turns images (N, 3, H, W) into bytes, normalised as the networks of `made_run` are fed."""
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in ((0.5, 0.4, 0.3), (0.2, 0.2, 1.0)))
    return (images.float() / 255 - mean) / std


def test_the_loss_is_shared_between_labels_and_teacher(tmp_path):
    """The teacher has the run's best weights and its own normalisation, and is not trained."""
    run = make_run(tmp_path / "teacher")
    trainer = student_of(run.path, "ant", "bee", temperature=3.0, distill_weight=0.25, label_smoothing=0.1)
    dataset = trainer.loader.dataset
    images, labels = dataset.images[:4].permute(0, 3, 1, 2), dataset.labels[:4]
    teacher = read_network(run.path).load(CPU)
    assert teacher.weights == "weights"
    logits = trainer.model((images.float() / 255 - 0.5) / 0.25)
    expected = 0.75 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected += 0.25 * distillation(logits, teacher.model(seen_by_teacher(images)), 3.0)
    torch.testing.assert_close(trainer.objective(images, labels).loss, expected, rtol=1e-4, atol=1e-5)
    trainer.run_epoch()
    ((taught_by, _),) = trainer.objective.teacher.members
    kept = zip(taught_by.state_dict().values(), teacher.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)


def test_an_ensemble_teaches_the_mean_probabilities_of_its_chosen_members(tmp_path):
    ensemble, images = make_ensemble(tmp_path / "ensemble", tmp_path / "data.npz"), torch.from_numpy(images_like(5))
    found = load_teacher(ensemble, CPU, CLASSES)(images.permute(0, 3, 1, 2), torch.float32).softmax(dim=1)
    torch.testing.assert_close(found, mean_of_voters(ensemble, images), rtol=1e-4, atol=1e-5)


def test_what_cannot_teach_is_refused(tmp_path):
    run = make_run(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="trained on other classes; give a run on the same data set"):
        load_teacher(run.path, CPU, ("ant", "cat"))
    with pytest.raises(FastcifarError, match="is no run"):
        load_teacher(tmp_path, CPU, ("ant", "bee"))
