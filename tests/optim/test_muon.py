"""Muon, against torch's own and against what it should do to singular values."""

from functools import partial

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

from fastcifar.optim.muon import COEFFICIENTS, ITERATIONS, Muon, newton_schulz, orthogonalize_all

SHAPES = [(5, 9), (7, 7), (1, 4), (4, 1), (64, 27)]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def closed_form(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@EACH_SHAPE
def test_equals_its_closed_form(shape):
    """A zero matrix stays zero, beside others."""
    matrices = torch.stack([random(*shape), torch.zeros(shape), 1e-6 * random(*shape, seed=1)])
    ours = newton_schulz(matrices, torch.float32)
    assert not ours[1].any()
    for i in (0, 2):
        torch.testing.assert_close(ours[i].double(), closed_form(matrices[i]), rtol=0, atol=2e-5)


def test_a_convolution_is_the_matrix_of_its_filters():
    """Its memory format does not matter, nor do weights of the same and other shapes beside it."""
    tensors = [random(6, 5, 3, 3), random(6, 5, 3, 3, seed=1), random(12, 6, 1, 1), random(4, 9)]
    tensors.append(random(6, 5, 3, 3, seed=2).to(memory_format=torch.channels_last))
    results = orthogonalize_all(tensors, 0.5, torch.float32)
    for tensor, result in zip(tensors, results, strict=True):
        factor = 0.5 * max(1.0, len(tensor) / tensor[0].numel()) ** 0.5
        expected = factor * closed_form(tensor.flatten(1)).view(tensor.shape)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def steps_in_float64(
    start: Tensor, gradients: list[Tensor], rates: list[float], momentum: float, decay: float
) -> Tensor:
    """Steps by Nesterov momentum, the closed form with its factor, and decay apart from the gradient."""
    weight, velocity = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for gradient, lr in zip(gradients, rates, strict=True):
        velocity = momentum * velocity + gradient.double()
        factor = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
        weight = (1 - lr * decay) * weight - lr * factor * closed_form(gradient.double() + momentum * velocity)
    return weight


@EACH_SHAPE
def test_is_as_accurate_as_torchs_muon(shape):
    start, gradients = random(*shape), [random(*shape, seed=seed) for seed in range(1, 5)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    moved = steps_in_float64(start, gradients, [0.1] * 4, 0.9, 0.05) - start.double()
    errors = []
    for build in (torch.optim.Muon, partial(Muon, dtype=torch.bfloat16), partial(Muon, dtype=torch.float32)):
        parameter = nn.Parameter(start.clone())
        optimizer = build([parameter], **options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        errors.append(relative_error(parameter.detach() - start, moved))
    theirs, half, single = errors
    assert half <= 2 * max(theirs, torch.finfo(torch.bfloat16).eps / 2)
    assert single < 2e-5


def test_follows_a_changing_learning_rate_where_there_is_a_gradient():
    start, gradients, rates = (
        random(8, 5, 3, 3),
        [random(8, 5, 3, 3, seed=seed) for seed in range(1, 4)],
        [0.1, 0.05, 0.2],
    )
    parameter, untouched = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Muon([parameter, untouched], momentum=0.8, weight_decay=0.1, dtype=torch.float32)
    for gradient, lr in zip(gradients, rates, strict=True):
        parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert torch.equal(untouched, start)
    expected = steps_in_float64(start.flatten(1), [gradient.flatten(1) for gradient in gradients], rates, 0.8, 0.1)
    torch.testing.assert_close(parameter.detach().double().flatten(1), expected, rtol=0, atol=1e-5)


def test_what_is_not_orthogonalised_moves_as_in_sgd():
    """The decay alone differs: it comes first and is not in the momentum."""
    vector, other = (nn.Parameter(random(11)) for _ in range(2))
    optimizer = Muon([{"params": [vector], "orthogonalize": False}], lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD([other], 0.1, momentum=0.9, nesterov=True)
    for seed in range(3):
        vector.grad, other.grad = random(11, seed=seed + 1), random(11, seed=seed + 1)
        with torch.no_grad():
            other.mul_(1 - 0.1 * 0.01)
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(vector, other, rtol=1e-6, atol=1e-7)
