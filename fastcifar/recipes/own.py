"""Our own recipes. Each claim is the reported figure to reach; RESULTS.md has what was reached."""

from fastcifar.config import AverageConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.recipes.registry import declare, derive
from fastcifar.recipes.report1 import r1_resnet20_standard, r1_resnet_prop_standard
from fastcifar.recipes.report5 import r5_resnet18_asam


@declare("ours")
def quickstart() -> RunConfig:
    """This gives a first result within three minutes on two CPU cores, on CIFAR-10 where it is at hand."""
    return RunConfig(
        model=ModelConfig(arch="resnet", blocks=(1, 1, 1), channels=(16, 32, 64), pre_activation=True, final_norm=True),
        data=DataConfig(dataset="auto"),
        optim=OptimConfig(lr=0.2),
        schedule=ScheduleConfig(warmup="15%"),
        average=AverageConfig(ema_decay=(0.99,)),
        epochs=5,
    )


@declare("ours", 0.9123, "average")
def resnet20_v2_best() -> RunConfig:
    """The small network underfits, and stronger augmentation took three points from it in report 1; so it gets more
    epochs and a final norm instead.
    """
    return derive(r1_resnet20_standard(), optimizer="sgd-nesterov", final_norm=True, epochs=400, watch_test=False)


@declare("ours", 0.9515, "average")
def resnet_prop_best() -> RunConfig:
    """The large network overfits, so it gets AutoAugment with cutout (Cubuk et al. 2019, arXiv:1805.09501), label
    smoothing and a final norm.
    """
    stronger = {"augment": "standard,autoaugment,cutout_1x16", "label_smoothing": 0.1}
    return derive(r1_resnet_prop_standard(), optimizer="sgd-nesterov", final_norm=True, watch_test=False, **stronger)


@declare("ours", 0.9741, "average")
def resnet18_asam() -> RunConfig:
    """This trains by ASAM as report 5 does, but with the smoothed cross-entropy of ASAM's authors, AutoAugment with
    cutout, and 400 epochs.
    """
    loss = {"loss": "cross-entropy", "label_smoothing": 0.1}
    return derive(r5_resnet18_asam(), augment="standard,autoaugment,cutout_1x16", epochs=400, watch_test=False, **loss)


@declare("ours", 0.9768, "ensemble")
def resnet18_asam_member() -> RunConfig:
    """Each member of an ensemble is trained by ASAM for half as long, so that twice as many can be afforded; those
    that the validation split chooses vote.
    """
    return derive(resnet18_asam(), epochs=200, val_split=5000)
