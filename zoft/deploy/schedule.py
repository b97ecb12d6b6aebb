"""The learning rate over the steps of a run."""

from zoft.deploy.config import FinetuneConfig


def schedule_factor(config: FinetuneConfig, step: int) -> float:
    """Return what multiplies the learning rate at ``step`` (from 0): linear warm-up, then constant or linear to 0.

    >>> config = FinetuneConfig(model="m", task="sst2", steps=10, warmup=2, schedule="linear")
    >>> [schedule_factor(config, step) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "linear":
        return (config.steps - step) / max(1, config.steps - config.warmup)
    return 1.0
