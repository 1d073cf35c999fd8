"""The learning rate of every step."""

import math

from fpocli.config import TrainConfig


def warmup_steps(steps: int, settings: TrainConfig) -> int:
    """Steps of the warm-up, set as a number of steps or, below 1, as a share of all steps."""
    return round(settings.warmup * (steps if settings.warmup < 1 else 1))


def learning_rate(step: int, steps: int, settings: TrainConfig) -> float:
    """The rate of a step counted from 0: linear warm-up, then constant, cosine or linear to 0."""
    warmup = warmup_steps(steps, settings)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    rest = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * rest)),
        "linear": 1 - rest,
    }[settings.schedule]
    return settings.lr * factor
