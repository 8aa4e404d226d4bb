"""Muon: momentum whose matrices are orthogonalised before they move the weights.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
kellerjordan.github.io/posts/muon. As in `torch.optim.Muon`, an update is multiplied by `max(1, rows / columns) ** 0.5`,
and the weights decay apart from the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fastcifar.device import native_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of an odd quintic whose iteration takes all of (0, 1] to about 1: steep at 0, not exact at 1."""
ITERATIONS = 5
"""So many iterations take every singular value above a hundredth of the norm to between 0.68 and 1.14."""


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights to orthogonalise: those of two dimensions or more, except the last, whose rows are classes."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1][:-1]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in the groups with `orthogonalize`, plain in the others.

    Convolution weights (O, I, H, W) are matrices (O, H * W * I); those of one shape are multiplied as one batch.
    Nothing waits for the device, even under a gradient scaler.

    Args:
        params: parameters, or groups of them with any of the settings below. Orthogonalised ones have two dimensions or
            more.
        lr: the root mean square of an update is about `lr / max(rows, columns) ** 0.5`, times the factor above.
        weight_decay: share of the weights lost in a step, over `lr`.
        momentum: share of the momentum kept in a step.
        dtype: of the matrix products; by default as suits the device.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.1,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        orthogonalize: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, orthogonalize=orthogonalize, dtype=dtype)
        super().__init__(params, settings)
        # This tells a scaler to pass its scale and whether the gradient overflowed, instead of waiting to know.
        self._step_supports_amp_scaling = True
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                gradients = [parameter.grad for parameter in parameters]
                (self.move_matrices if group["orthogonalize"] else self.move_plainly)(parameters, gradients, group)

    def move_matrices(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        scale, overflowed = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        if overflowed is not None:
            # On overflow, momenta and weights stay. Non-finite values are removed first, since 0 times them is NaN.
            skipped = overflowed.bool()
            gradients = [torch.where(skipped, 0.0, gradient) for gradient in gradients]
            lr, momentum = lr * (1 - overflowed), torch.where(skipped, 1.0, momentum)
        momenta = self.momenta_of(parameters)
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_mul(momenta, momentum)
        torch._foreach_add_(ahead, gradients)
        updates = orthogonalize_all(ahead, lr, group["dtype"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(parameters, updates)

    def move_plainly(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        scale, overflowed = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        decaying = lr if overflowed is None else lr * (1 - overflowed)
        torch._foreach_mul_(parameters, 1 - decaying * group["weight_decay"])
        sgd(
            parameters,
            gradients,
            list(self.momenta_of(parameters)) if momentum else [None] * len(parameters),
            fused=True,
            grad_scale=scale,
            found_inf=overflowed,
            weight_decay=0.0,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=momentum > 0,
            maximize=False,
        )

    def momenta_of(self, parameters: list[Tensor]) -> list[Tensor]:
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters]


def orthogonalize_all(tensors: Sequence[Tensor], lr: float | Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """`lr * max(1, rows / columns) ** 0.5` times the nearest orthogonal matrix to each of `tensors`.

    Results are float32 in the shapes of `tensors`.

    The channels of a convolution come last in its matrix, as they do in memory; the order of the columns does not
    matter.
    """
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    results = list(tensors)
    for members in places.values():
        stacked = torch.stack([tensors[place].movedim(1, -1) for place in members])
        matrices = stacked.flatten(2)
        rows, columns = matrices.shape[1:]
        orthogonal = newton_schulz(
            matrices, dtype or (torch.bfloat16 if native_bf16(matrices.device) else torch.float32)
        ).float()
        orthogonal = orthogonal * (lr * max(1.0, rows / columns) ** 0.5)
        for place, result in zip(members, orthogonal.view(stacked.shape), strict=True):
            results[place] = result.movedim(-1, 1)
    return results


def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The approximately nearest orthogonal matrix to each of `matrices` (B, rows, columns), contiguous in `dtype`.

    Zero stays zero. A matrix `U diag(s) V'` of norm 1 becomes `U diag(p(...p(s))) V'`, where `p(x) = a x + b x**3 + c
    x**5`.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    # The spectral norm is at most the Frobenius norm, and the polynomial does not grow below 1.
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    wide = (matrices / norms.clamp_min(torch.finfo(matrices.dtype).tiny)).to(dtype)
    wide = wide.mT if tall else wide
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide.mT.contiguous() if tall else wide
