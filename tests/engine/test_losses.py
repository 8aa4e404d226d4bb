"""Losses against timm's, torch's and closed forms."""

import math

import pytest
import torch
from timm.loss import AsymmetricLossSingleLabel
from torch import nn
from torch.nn import functional as F

from fastcifar.config import LossConfig
from fastcifar.engine.objective import asymmetric, build_loss, cross_entropy, distillation
from fastcifar.errors import ConfigError


def batch(count: int = 7, classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    logits = 3 * torch.randn(count, classes, generator=generator, dtype=dtype)
    return logits.requires_grad_(), torch.arange(count) % classes


@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "smoothing"), [(0, 4, 0.1), (0, 0, 0), (1, 2, 0), (2, 4, 0.3)])
def test_asymmetric_equals_timms(gamma_pos, gamma_neg, smoothing):
    """In value and gradient."""
    logits, labels = batch(dtype=torch.float32)
    theirs_in = logits.detach().clone().requires_grad_()
    ours = asymmetric(logits, labels, gamma_pos, gamma_neg, smoothing)
    theirs = AsymmetricLossSingleLabel(gamma_pos, gamma_neg, eps=smoothing)(theirs_in, labels)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, theirs_in.grad)


def test_asymmetric_without_focus_is_cross_entropy():
    logits, labels = batch()
    torch.testing.assert_close(
        asymmetric(logits, labels, 0, 0, 0.2), F.cross_entropy(logits.float(), labels, label_smoothing=0.2)
    )


def test_asymmetric_takes_shares():
    """A one-hot share is a label; the focus of a mixed one is mixed."""
    logits, labels = batch()
    one_hot = F.one_hot(labels, 5).float()
    torch.testing.assert_close(asymmetric(logits, one_hot), asymmetric(logits, labels))
    p = torch.tensor([[0.25, 0.75]])
    expected = -(0.5 * (0.5 * (1 - p) ** 1 + 0.5 * p**2) * p.log()).sum()
    torch.testing.assert_close(asymmetric(p.log(), torch.tensor([[0.5, 0.5]]), 1, 2, 0.0), expected)


def test_asymmetric_is_finite_at_the_ends():
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]], requires_grad=True)
    loss = asymmetric(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_distillation_closed_form():
    """Two classes: KL of Bernoulli distributions with the softened probabilities, times the temperature squared."""
    student, teacher, temperature = 1.3, -0.4, 2.5
    q, p = (1 / (1 + math.exp(-value / temperature)) for value in (student, teacher))
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) * temperature**2
    found = distillation(torch.tensor([[student, 0.0]]), torch.tensor([[teacher, 0.0]]), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_distillation_pulls_towards_the_teacher():
    """At a high temperature the gradient is that of half the squared distance of centred logits, over the classes
    (Hinton et al., 2.1).
    """
    student, _ = batch(3, 4)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    distillation(student, teacher, 1000.0).backward()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(student.grad, (centred / 4 / 3).detach(), rtol=2e-2, atol=2e-3)


def test_build_loss_reads_the_configuration():
    logits, labels = batch(dtype=torch.float32)
    torch.testing.assert_close(
        build_loss(LossConfig(label_smoothing=0.1))(logits, labels),
        nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels),
    )
    torch.testing.assert_close(build_loss(LossConfig())(logits, labels), cross_entropy(logits, labels))
    torch.testing.assert_close(
        build_loss(LossConfig("asymmetric"))(logits, labels), AsymmetricLossSingleLabel(0, 4, 0.1)(logits, labels)
    )
    torch.testing.assert_close(
        build_loss(LossConfig("asymmetric", label_smoothing=0.0, gamma_neg=2.0))(logits, labels),
        asymmetric(logits, labels, 0, 2, 0),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma_neg": 2.0}, "cross-entropy does not read gamma_neg"),
        ({"temperature": 2.0}, "add --teacher RUN"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**settings)
