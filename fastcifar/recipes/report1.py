"""Report 1: augmentation and stochastic weight averaging in ResNetV2.

It gives batch 128, a learning rate from 0.05 to 0.1 and the normalisation; epochs are those of its 6 hours at 463
img/s; the rest is that of the code it builds on, github.com/kuangliu/pytorch-cifar: SGD with weight decay 5e-4, cosine.
Gradients exploded above 0.1: here the rate is warmed up. The test accuracy is logged every epoch, as there.
"""

from fastcifar.config import ModelConfig, OptimConfig, RunConfig
from fastcifar.recipes.registry import declare, derive


def baseline(model: ModelConfig) -> RunConfig:
    """What all of the report's runs share."""
    return RunConfig(model, optim=OptimConfig("sgd", lr=0.1, weight_decay=5e-4), epochs=200, watch_test=True)


def with_swa(parent: RunConfig) -> RunConfig:
    """The averaging authors' recipe for PreResNet on CIFAR-10, github.com/timgaripov/swa, with its start at the
    report's 75%.

    The rate is constant, falls from half the way to the start on, and stays at 0.01 from 90% of it; what is averaged
    still moves.
    """
    swa = {"schedule": "swa", "final_lr": 0.1, "horizon": "75%", "swa_start": "75%"}
    return derive(parent, weight_decay=3e-4, ema_decay=(0.0,), **swa)


def with_swa_as_written(parent: RunConfig, start: str) -> RunConfig:
    """Averaging along the falling cosine, as the report says that its rate was not tuned for it."""
    return derive(parent, swa_start=start, ema_decay=(0.0,))


@declare("R1 T5", 0.9123)
def r1_resnet20_standard() -> RunConfig:
    """ResNetV2-20 with crop and flip."""
    return baseline(ModelConfig("resnet20_v2"))


@declare("R1 T5", 0.8819)
def r1_resnet20_transform1() -> RunConfig:
    """Rotation and translation besides, by ranges of ours, since the report gives none."""
    return derive(r1_resnet20_standard(), augment="transform1")


@declare("R1 T5", 0.8817)
def r1_resnet20_transform2() -> RunConfig:
    """More of both, and shear."""
    return derive(r1_resnet20_standard(), augment="transform2")


@declare("R1 4")
def r1_resnet20_transform1_reflect() -> RunConfig:
    """Without the black corners that the report blames: one bilinear warp, reflected at the border."""
    return derive(r1_resnet20_transform1(), augment="transform1_reflect")


@declare("R1 4")
def r1_resnet20_transform2_reflect() -> RunConfig:
    """Without the black corners that the report blames: one bilinear warp, reflected at the border."""
    return derive(r1_resnet20_transform2(), augment="transform2_reflect")


@declare("R1 4")
def r1_resnet20_rotate5() -> RunConfig:
    """Rotations below 5 degrees, which the report wished that it had tried."""
    return derive(r1_resnet20_standard(), augment="standard,rotate5")


@declare("R1 4")
def r1_resnet20_turns() -> RunConfig:
    """Whole quarter turns, which the report wished that it had tried."""
    return derive(r1_resnet20_standard(), augment="standard,turns")


@declare("R1 T5", 0.9123, "average")
def r1_resnet20_swa() -> RunConfig:
    """Stochastic weight averaging by its authors' recipe."""
    return with_swa(r1_resnet20_standard())


@declare("R1 T5", 0.9123, "average")
def r1_resnet20_swa_as_written() -> RunConfig:
    """Averaging from 75% of the epochs on, under a schedule that was not tuned for it."""
    return with_swa_as_written(r1_resnet20_standard(), "75%")


@declare("R1 1.3", None, "average")
def r1_resnet20_swa_early_as_written() -> RunConfig:
    """Averaging from 10% of the epochs on, which the report tried as well."""
    return with_swa_as_written(r1_resnet20_standard(), "10%")


@declare("R1 T5", 0.9515)
def r1_resnet_prop_standard() -> RunConfig:
    """The proposed network, a pre-activation ResNet-18, with crop and flip: the report's best."""
    return baseline(ModelConfig("resnet_prop", final_norm=False))


@declare("R1 T5", 0.9464)
def r1_resnet_prop_transform1() -> RunConfig:
    """Rotation and translation besides, by ranges of ours, since the report gives none."""
    return derive(r1_resnet_prop_standard(), augment="transform1")


@declare("R1 T5", 0.9302)
def r1_resnet_prop_transform2() -> RunConfig:
    """More of both, and shear."""
    return derive(r1_resnet_prop_standard(), augment="transform2")


@declare("R1 T5", 0.9489)
def r1_resnet_prop_transform3() -> RunConfig:
    """Crop, flip, and a tenth of the images in grey."""
    return derive(r1_resnet_prop_standard(), augment="transform3")


@declare("R1 4")
def r1_resnet_prop_transform1_reflect() -> RunConfig:
    """Without the black corners that the report blames: one bilinear warp, reflected at the border."""
    return derive(r1_resnet_prop_transform1(), augment="transform1_reflect")


@declare("R1 4")
def r1_resnet_prop_transform2_reflect() -> RunConfig:
    """Without the black corners that the report blames: one bilinear warp, reflected at the border."""
    return derive(r1_resnet_prop_transform2(), augment="transform2_reflect")


@declare("R1 T5", 0.9464, "average")
def r1_resnet_prop_swa() -> RunConfig:
    """Stochastic weight averaging by its authors' recipe."""
    return with_swa(r1_resnet_prop_standard())


@declare("R1 T5", 0.9464, "average")
def r1_resnet_prop_swa_as_written() -> RunConfig:
    """Averaging from 75% of the epochs on, under a schedule that was not tuned for it."""
    return with_swa_as_written(r1_resnet_prop_standard(), "75%")


@declare("R1 1.3", None, "average")
def r1_resnet_prop_swa_early_as_written() -> RunConfig:
    """Averaging from 10% of the epochs on, which the report tried as well."""
    return with_swa_as_written(r1_resnet_prop_standard(), "10%")


@declare("R1 2.1")
def r1_resnet_prop_batch256_as_written() -> RunConfig:
    """Twice the batch at the same rate, which cost the report accuracy."""
    return derive(r1_resnet_prop_standard(), batch_size=256)


@declare("R1 2.1")
def r1_resnet_prop_batch512_as_written() -> RunConfig:
    """Four times the batch at the same rate, which cost the report accuracy."""
    return derive(r1_resnet_prop_standard(), batch_size=512)


@declare("R1 2.1")
def r1_resnet_prop_batch1024_as_written() -> RunConfig:
    """Eight times the batch at the same rate, which cost the report accuracy."""
    return derive(r1_resnet_prop_standard(), batch_size=1024)


@declare("R1 2.1")
def r1_resnet_prop_batch256() -> RunConfig:
    """Rate and batch grow alike, after a warm-up (Goyal et al. 2017, arXiv:1706.02677)."""
    return derive(r1_resnet_prop_batch256_as_written(), scale_lr="linear")


@declare("R1 2.1")
def r1_resnet_prop_batch512() -> RunConfig:
    """Rate and batch grow alike, after a warm-up (Goyal et al. 2017, arXiv:1706.02677)."""
    return derive(r1_resnet_prop_batch512_as_written(), scale_lr="linear")


@declare("R1 2.1")
def r1_resnet_prop_batch1024() -> RunConfig:
    """Rate and batch grow alike, after a warm-up (Goyal et al. 2017, arXiv:1706.02677)."""
    return derive(r1_resnet_prop_batch1024_as_written(), scale_lr="linear")
