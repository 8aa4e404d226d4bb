"""Learning from a run folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_run import make_run
from torch.nn import functional as F

from fastcifar.config import DataConfig, EngineConfig, LossConfig, ModelConfig, RunConfig
from fastcifar.data.image_set import ImageSet
from fastcifar.engine.objective import Teacher, distillation, load_teacher
from fastcifar.engine.trainer import Trainer
from fastcifar.errors import ConfigError, FastcifarError
from fastcifar.runs.ensembles import EnsembleReport, Member, Vote, write_report
from fastcifar.runs.network import read_network

CPU = torch.device("cpu")


def image_set(*classes: str) -> ImageSet:
    images = torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(12) % len(classes), classes, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def config(teacher, **loss) -> RunConfig:
    return RunConfig(
        model=ModelConfig("resnet", blocks=(1,), channels=(4,)),
        data=DataConfig(loader="torch", chunk_size=12),
        loss=LossConfig(teacher=teacher, **loss),
        engine=EngineConfig(device="cpu", precision="fp32", compile="off"),
        epochs=1,
        batch_size=4,
    )


def test_the_loss_is_shared_between_labels_and_teacher(tmp_path):
    """The teacher has the run's best weights and its own normalisation, and is not trained."""
    run = make_run(tmp_path / "teacher")
    dataset = image_set("ant", "bee")
    trainer = Trainer(config(run.path, temperature=3.0, distill_weight=0.25, label_smoothing=0.1), dataset)
    images, labels = dataset.images[:4].permute(0, 3, 1, 2), dataset.labels[:4]
    teacher = read_network(run.path).load(CPU)
    assert teacher.weights == "weights"
    floats = images.float() / 255
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in ((0.5, 0.4, 0.3), (0.2, 0.2, 1.0)))
    logits = trainer.model((floats - 0.5) / 0.25)
    expected = 0.75 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected += 0.25 * distillation(logits, teacher.model((floats - mean) / std), 3.0)
    torch.testing.assert_close(trainer.objective(images, labels).loss, expected, rtol=1e-4, atol=1e-5)
    ((taught_by, _),) = trainer.objective.teacher.members
    before = [tensor.clone() for tensor in taught_by.state_dict().values()]
    trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)
    after = taught_by.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_ensemble_teaches_its_mean_probabilities(tmp_path):
    """Of the members chosen, each with its own weights; softened as one network's are."""
    runs = []
    for seed in range(3):
        torch.manual_seed(seed)
        runs.append(make_run(tmp_path / "ensemble" / f"seed{seed}").path)
    members = tuple(
        Member(Path(run.name), name, 0.5, 0.5)
        for run, name in zip(runs, ("ema-0.999", "weights", "weights"), strict=True)
    )
    whole, chosen = (Vote(voting, 0.5, 0.5, (0.4, 0.6), 0.5, 0, 0.5, 0.5, 0.1, 0.5) for voting in ((0, 1, 2), (0, 2)))
    write_report(tmp_path / "ensemble", EnsembleReport("colours", 12, "none", members, whole, chosen, None, (whole,)))
    dataset = image_set("ant", "bee")
    trainer = Trainer(config(tmp_path / "ensemble", temperature=3.0, distill_weight=1.0), dataset)
    images, labels = dataset.images[:4].permute(0, 3, 1, 2), dataset.labels[:4]
    floats = images.double() / 255
    mean, std = (torch.tensor(part).view(3, 1, 1).double() for part in ((0.5, 0.4, 0.3), (0.2, 0.2, 1.0)))
    with torch.no_grad():
        voting = [
            read_network(runs[0]).load(CPU, "ema-0.999").model.double(),
            read_network(runs[2]).load(CPU, "weights").model.double(),
        ]
        target = sum(model((floats - mean) / std).softmax(dim=1) for model in voting) / 2
        softened = target ** (1 / 3.0)
        softened /= softened.sum(dim=1, keepdim=True)
        student = (trainer.model.double()((floats - 0.5) / 0.25) / 3.0).log_softmax(dim=1)
        expected = 9 * (softened * (softened.log() - student)).sum(dim=1).mean()
    trainer.model.float()
    torch.testing.assert_close(trainer.objective(images, labels).loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert trainer.run_epoch(stop=lambda: False, tick=lambda batch: None)


def test_an_ensemble_of_equals_teaches_as_its_member(tmp_path):
    run = make_run(tmp_path / "seed0")
    alone = load_teacher(run.path, CPU, ("ant", "bee"))
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    logits = [teacher(images, torch.float32) for teacher in (alone, Teacher(alone.members * 2))]
    student = torch.randn(5, 2)
    torch.testing.assert_close(distillation(student, logits[1], 4.0), distillation(student, logits[0], 4.0))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    run = make_run(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="trained on other classes; give a run on the same data set"):
        Trainer(config(run.path), image_set("ant", "cat"))


def test_a_teacher_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FastcifarError, match="is no run"):
        Trainer(config(tmp_path), image_set("ant", "bee"))


def test_the_default_share_and_temperature():
    resolved = replace(LossConfig(), teacher="somewhere").resolved
    assert (resolved.temperature, resolved.distill_weight) == (4.0, 0.9)
