"""Report 1: augmentation and stochastic weight averaging in ResNetV2.

It gives batch 128, a learning rate from 0.05 to 0.1 and the normalisation; epochs are those of its 6 hours at 463
img/s; the rest is that of the code it builds on, github.com/kuangliu/pytorch-cifar: SGD with weight decay 5e-4, cosine.
Gradients exploded above 0.1: here the rate is warmed up. The test accuracy is logged every epoch, as there.
"""

from fastcifar.config import ModelConfig, OptimConfig, RunConfig
from fastcifar.recipes.registry import declare, derive, variant


def baseline(model: ModelConfig) -> RunConfig:
    """The settings that all runs of the report share."""
    return RunConfig(model, optim=OptimConfig("sgd", lr=0.1, weight_decay=5e-4), epochs=200, watch_test=True)


@declare("R1 T5", 0.9123)
def r1_resnet20_standard() -> RunConfig:
    """ResNetV2-20 with crop and flip."""
    return baseline(ModelConfig("resnet20_v2"))


@declare("R1 T5", 0.9515)
def r1_resnet_prop_standard() -> RunConfig:
    """The proposed network, a pre-activation ResNet-18, with crop and flip: the report's best."""
    return baseline(ModelConfig("resnet_prop", final_norm=False))


ABOUT = {
    "transform1": "Rotation and translation besides, by ranges of ours, since the report gives none.",
    "transform2": "More of both, and shear.",
    "transform3": "Crop, flip, and a tenth of the images in grey.",
    "reflect": "Without the black corners that the report blames: one bilinear warp, reflected at the border.",
    "swa": "Stochastic weight averaging by its authors' recipe.",
    "swa_as_written": "Averaging from 75% of the epochs on, under a schedule that was not tuned for it.",
    "swa_early": "Averaging from 10% of the epochs on, which the report tried as well.",
}
SWA = {"weight_decay": 3e-4, "ema_decay": (0.0,), "schedule": "swa", "final_lr": 0.1, "horizon": "75%"}
"""The SWA authors' settings for PreResNet on CIFAR-10, github.com/timgaripov/swa, with the report's start at 75%.

The rate is constant, falls from half the way to the start on, and stays at 0.01 from 90% of it, so the averaged weights
still move.
"""


def network_recipes(network: str, averaged: float, **transforms: float) -> None:
    """Declares the report's recipes for a network, given its claims for averaging and for the transforms."""
    standard = f"{network}_standard"
    for name, claim in transforms.items():
        variant(f"{network}_{name}", standard, "R1 T5", claim, about=ABOUT[name], augment=name)
    for name in ("transform1", "transform2"):
        augment = f"{name}_reflect"
        variant(f"{network}_{augment}", f"{network}_{name}", "R1 4", about=ABOUT["reflect"], augment=augment)
    swa, written, early = f"{network}_swa", f"{network}_swa_as_written", f"{network}_swa_early_as_written"
    variant(swa, standard, "R1 T5", averaged, "average", ABOUT["swa"], swa_start="75%", **SWA)
    # With the falling cosine, as the report says that its rate was not tuned for averaging.
    along = {"ema_decay": (0.0,)}
    variant(written, standard, "R1 T5", averaged, "average", ABOUT["swa_as_written"], swa_start="75%", **along)
    variant(early, standard, "R1 1.3", None, "average", ABOUT["swa_early"], swa_start="10%", **along)


network_recipes("r1_resnet20", 0.9123, transform1=0.8819, transform2=0.8817)
network_recipes("r1_resnet_prop", 0.9464, transform1=0.9464, transform2=0.9302, transform3=0.9489)


@declare("R1 4")
def r1_resnet20_rotate5() -> RunConfig:
    """Rotations below 5 degrees, which the report wished that it had tried."""
    return derive(r1_resnet20_standard(), augment="standard,rotate5")


@declare("R1 4")
def r1_resnet20_turns() -> RunConfig:
    """Whole quarter turns, which the report wished that it had tried."""
    return derive(r1_resnet20_standard(), augment="standard,turns")


for size in (256, 512, 1024):
    name = f"r1_resnet_prop_batch{size}"
    times = "A larger batch at the same rate, which cost the report accuracy."
    variant(f"{name}_as_written", "r1_resnet_prop_standard", "R1 2.1", about=times, batch_size=size)
    alike = "Rate and batch grow alike, after a warm-up (Goyal et al. 2017, arXiv:1706.02677)."
    variant(name, f"{name}_as_written", "R1 2.1", about=alike, scale_lr="linear")
