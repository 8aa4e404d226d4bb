"""Our own recipes."""

from fastcifar.config import AverageConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig


def quickstart() -> RunConfig:
    """A first result within three minutes on two CPU cores, on CIFAR-10 where it is at hand."""
    return RunConfig(
        model=ModelConfig(arch="resnet", blocks=(1, 1, 1), channels=(16, 32, 64), pre_activation=True, final_norm=True),
        data=DataConfig(dataset="auto"),
        optim=OptimConfig(lr=0.2),
        schedule=ScheduleConfig(warmup="15%"),
        average=AverageConfig(ema_decay=(0.99,)),
        epochs=5,
    )
