"""Report 3: a ResNet below five million parameters, by Adadelta.

It gives the network, the normalisation, crop and flip, lr 0.01, weight decay 1e-4 and 300 epochs; batch size and
restarts are not given: 128, and every 50 epochs. Its text says that the rate falls by steps, its table that it
restarts; the table's is the plain reading.
"""

from fastcifar.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig
from fastcifar.recipes.registry import declare, derive


@declare("R3", 0.9375)
def r3_resnet_s3_as_written() -> RunConfig:
    """The learning rate is 0.01, a hundredth of Adadelta's own."""
    return RunConfig(
        ModelConfig("resnet_s3", max_params=5e6),
        DataConfig(normalize="kuangliu"),
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
