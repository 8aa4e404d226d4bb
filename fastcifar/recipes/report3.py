"""Report 3: a ResNet below five million parameters, by Adadelta.

It gives the network, the normalisation, crop and flip, lr 0.01, weight decay 1e-4 and 300 epochs; batch size and
restarts are not given: 128, and every 50 epochs. Its text says that the rate falls by steps, its table that it
restarts; the table's is the plain reading. It sets a validation split apart without saying how large: 5,000 images
here.
"""

from fastcifar.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.recipes.registry import declare, derive, variant


@declare("R3", 0.9375)
def r3_resnet_s3_as_written() -> RunConfig:
    """The learning rate is 0.01, a hundredth of Adadelta's own."""
    return RunConfig(
        ModelConfig("resnet_s3", max_params=5e6),
        DataConfig(normalize="kuangliu", val_split=5000),
        OptimConfig("adadelta", lr=0.01, weight_decay=1e-4),
        ScheduleConfig("warm-restarts", warmup="0%", restart_period="50ep"),
        epochs=300,
    )


@declare("R3", 0.9375)
def r3_resnet_s3() -> RunConfig:
    """The learning rate is Adadelta's own."""
    return derive(r3_resnet_s3_as_written(), lr=None)


@declare("R3", 0.9375)
def r3_resnet_s3_step_as_written() -> RunConfig:
    """The rate falls by steps, as the report's text says without giving them; these are our defaults."""
    return derive(r3_resnet_s3_as_written(), schedule="step", restart_period=None)


@declare("R3", 0.9375)
def r3_resnet_s3_sgd() -> RunConfig:
    """The network is trained by SGD and a cosine, which the report did not try."""
    return derive(
        r3_resnet_s3(), optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine", restart_period=None, warmup=None
    )


for name in ("adam", "adagrad"):
    about = "The report compares this optimiser in a graph, at the best of several learning rates; this is its own."
    variant(f"r3_{name}", "r3_resnet_s3", "R3", about=about, optimizer=name, weight_decay=None)


@declare("R3")
def r3_small() -> RunConfig:
    """The report began with three stages of 1, 2 and 1 blocks."""
    shape = {"arch": "resnet", "blocks": (1, 2, 1), "channels": (64, 128, 256)}
    return derive(r3_resnet_s3(), max_params=None, **shape)
