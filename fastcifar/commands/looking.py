"""Commands that look at policies, networks and the machine; torch is imported only when one runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastcifar.config import EngineConfig, ModelConfig
from fastcifar.output import show
from fastcifar.settings import Positional

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class Preview:
    """Draw what augmentation policies make of some images, as PNG pictures."""

    policies: Positional[tuple[str, ...]] = ()
    """Policies, such as standard, autoaugment or crop:4,cutout:4x4; all that have a name by default."""
    augment: str | None = None
    """The same for one policy."""
    dataset: str = "auto"
    """Data set: a name, or the path of a .npz file, a folder of .npy files, or an image folder (PATH@32)."""
    data_dir: Path | None = None
    """Folder to look for the data set in."""
    out: Path = Path("preview")
    """A .png file; or a folder, which gets a page for each policy and all.png."""
    seed: int = 0
    """Seed of the augmentation."""
    epoch: int = 0
    """The epoch whose draws are shown."""
    count: int = 12
    """Images, evenly spread over the data set."""
    show_params: bool = False
    """Print what was drawn for each image."""

    def __call__(self) -> None:
        from fastcifar.augment.policy import POLICIES, parse

        policies = (self.augment,) if self.augment else self.policies or tuple(POLICIES)
        for text in policies:
            parse(text)
        from fastcifar.data.sources import load_dataset, resolve_auto
        from fastcifar.diagnostics.preview import preview

        name = resolve_auto(self.data_dir)[0] if self.dataset == "auto" else self.dataset
        dataset = load_dataset(name, "train", self.data_dir)
        options = {"seed": self.seed, "epoch": self.epoch, "count": self.count, "show_params": self.show_params}
        for path in preview(policies, dataset, self.out, **options):
            show(path)


@dataclass(frozen=True)
class Count:
    """Count the layers, parameters, FLOPs and activations of an architecture."""

    model: ModelConfig = field(default_factory=ModelConfig)

    def __call__(self) -> None:
        from fastcifar.diagnostics.count import print_count

        print_count(self.model)


@dataclass(frozen=True)
class Doctor:
    """Say what training would use on this machine, and what to change; the exit status is 1 if it could not train."""

    device: str = "auto"
    """The device that would train: auto, cpu, cuda or cuda:INDEX."""
    data_dir: Path | None = None
    """Folder to look for CIFAR-10 in, before $FASTCIFAR_DATA and the user cache."""
    quick: bool = False
    """Do not try the compiler, which takes some seconds."""

    def __call__(self) -> int:
        EngineConfig(device=self.device)
        from fastcifar.diagnostics.doctor import diagnose

        return diagnose(self.device, self.data_dir, quick=self.quick)


@dataclass(frozen=True)
class Completion:
    """Print a script that lets a shell complete what is typed, for: source <(fastcifar completion bash)."""

    shell: Positional[Shell]
    """The shell that the script is for."""
    words: Positional[tuple[str, ...]] = ()
    """What the script asks for in turn: after `--`, the words of a line up to the one to complete."""

    def __call__(self) -> None:
        from fastcifar.commands import COMMANDS
        from fastcifar.completion import SCRIPTS, candidates

        for line in candidates(self.words, COMMANDS) if self.words else [SCRIPTS[self.shell]]:
            show(line)
