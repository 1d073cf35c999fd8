"""How many steps there are, and the learning rate of each."""

import math

from fpocli.config import TrainConfig
from fpocli.system.errors import UserError


def total_steps(steps_per_epoch: int, settings: TrainConfig) -> int:
    """Steps of a run: those of all passes over the pairs, or --max-steps if that is less.

    Raises:
        UserError: there are none.
    """
    if not steps_per_epoch:
        raise UserError(
            "no pairs are left for training", "use a smaller --eval-fraction, or another --where"
        )
    steps = settings.epochs * steps_per_epoch
    return min(steps, settings.max_steps or steps)


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
