"""How the weights move: the settings of it, and the optimisers by name; torch is imported where they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastcifar.checks import check_name, check_range, check_reads, filled, given
from fastcifar.errors import ConfigError
from fastcifar.optim.course import Duration


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move. What is left out is the optimiser's own; what it does not read is refused."""

    optimizer: str = "sgd-nesterov"
    """Optimiser."""
    lr: float | None = None
    """Peak learning rate."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """Multiply the learning rate by the batch size over 128, or by the root of that."""
    momentum: float | None = None
    """Share of the momentum kept in a step; one-cycle sets that of SGD itself."""
    weight_decay: float | None = None
    """Decay of the weights; decoupled from the gradient in adamw and muon."""
    decay_norms: bool = True
    """Whether norms and biases decay as well."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; unclipped by default."""
    sharpness: Literal["none", "sam", "asam"] = "none"
    """Step by the gradient at the worst point nearby (SAM), or nearby in relation to each weight (ASAM); doubles the
    work."""
    rho: float | None = None
    """Radius of that neighbourhood."""
    eta: float | None = None
    """Added to each weight's magnitude by ASAM."""

    def __post_init__(self) -> None:
        check_name("optimiser", self.optimizer, OPTIMIZERS)
        check_name("sharpness", self.sharpness, SHARPNESS)
        check_reads("optimiser", self.optimizer, {"momentum": self.momentum}, OPTIMIZERS[self.optimizer].defaults)
        check_reads("sharpness", self.sharpness, {"rho": self.rho, "eta": self.eta}, SHARPNESS[self.sharpness])
        check_range("lr", self.lr, 0, exclusive=True)
        check_range("momentum", self.momentum, 0, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("clip_norm", self.clip_norm, 0, exclusive=True)
        check_range("rho", self.rho, 0, 1e6, exclusive=True)
        check_range("eta", self.eta, 0, 1e6)

    @property
    def resolved(self) -> OptimConfig:
        """Returns a copy with None replaced by the default where the setting is read."""
        return filled(self, OPTIMIZERS[self.optimizer].defaults | SHARPNESS[self.sharpness])

    def peak_lr(self, batch_size: int) -> float:
        """The highest learning rate of a run, scaled to the batch size."""
        ratio = batch_size / 128
        return given(self.resolved.lr) * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.scale_lr]


@dataclass(frozen=True)
class Optimizer:
    """An optimiser, with settings that train well at batch size 128."""

    target: str
    """`module:class` of a `torch.optim.Optimizer`."""
    lr: float
    weight_decay: float
    momentum: float | None = None
    """The default momentum; None where the optimiser has none."""
    nesterov: bool = False
    """Whether Nesterov's momentum is used; without momentum there is no difference."""
    form: Literal["fused", "foreach", "own"] = "fused"
    """One kernel for all parameters (fused), one for each operation (foreach), or a class that is not of torch (own).
    """

    @property
    def takes_cycles(self) -> bool:
        """Whether one-cycle may change its momentum."""
        return self.target == "torch.optim:SGD"

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of `OptimConfig` that it reads, with the values that stand for None."""
        own = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return {name: value for name, value in own.items() if value is not None}


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("torch.optim:SGD", lr=0.1, weight_decay=5e-4, momentum=0.9),
    "sgd-nesterov": Optimizer("torch.optim:SGD", lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=True),
    "adam": Optimizer("torch.optim:Adam", lr=3e-3, weight_decay=1e-4),
    "adamw": Optimizer("torch.optim:AdamW", lr=3e-3, weight_decay=5e-2),
    "radam": Optimizer("torch.optim:RAdam", lr=1e-2, weight_decay=1e-4, form="foreach"),
    "rmsprop": Optimizer("torch.optim:RMSprop", lr=1e-3, weight_decay=1e-4, momentum=0.0, form="foreach"),
    "adagrad": Optimizer("torch.optim:Adagrad", lr=1e-2, weight_decay=1e-4),
    "adadelta": Optimizer("torch.optim:Adadelta", lr=1.0, weight_decay=1e-4, form="foreach"),
    "muon": Optimizer("fastcifar.optim.muon:Muon", lr=0.1, weight_decay=1e-2, momentum=0.9, form="own"),
}
"""The optimisers by name.

The learning rates are the best of a grid (factors of 2 to 3) for a small pre-activation ResNet, 10,000 images and three
epochs; the decays are customary.
"""

SHARPNESS: dict[str, dict[str, Any]] = {"none": {}, "sam": {"rho": 0.05}, "asam": {"rho": 0.5, "eta": 0.01}}
"""The settings of `OptimConfig` that each kind of sharpness-aware minimisation reads, with their defaults."""


@dataclass(frozen=True)
class AverageConfig:
    """Averages of the weights, measured beside the weights themselves."""

    ema_decay: tuple[float, ...] = (0.999,)
    """Decays a step of exponential averages, at most four, each warmed up from 0; 0 keeps none."""
    swa_start: str | None = None
    """From here on, average the weights at the end of every epoch (SWA), such as 75%; batch norm statistics are
    measured anew."""

    def __post_init__(self) -> None:
        for decay in self.ema_decay:
            check_range("ema_decay", decay, 0, 1)
        if len({average_name(decay) for decay in self.decays}) != len(self.decays) or len(self.decays) > 4:
            raise ConfigError(
                f"ema_decay {' '.join(map(str, self.ema_decay))} does not suit; give one to four different decays, "
                "or 0."
            )
        if self.swa_start is not None:
            Duration.parse(self.swa_start)

    @property
    def decays(self) -> tuple[float, ...]:
        return tuple(decay for decay in self.ema_decay if decay)


def average_name(decay: float) -> str:
    """The name of an exponential average in checkpoints and records, which is distinct up to six digits."""
    return f"ema-{decay:g}"
