"""Alpha that holds the constraint's divergence at a value, by dual ascent (--hold).

Training maximises the preference under X <= V, where X is D or K of the rejected responses, which
the constraint acts on. Alpha is the multiplier of that condition: it rises while X is above V,
falls while it is below, and is 0 where the condition does not bind. The step is taken in
s = log(1 + alpha V), so that it has no unit: alpha V grows by a share of itself where it is large,
and by a fixed amount near 0.
"""

import math

# Change of s per step where X is twice V, which is also the largest.
_RATE = 0.1


class HeldAlpha:
    """The weight of the constraint.

    Args:
        alpha: where it starts.
        value: V, in the unit of X; None leaves alpha as it is.
    """

    def __init__(self, alpha: float, value: float | None) -> None:
        self.alpha = alpha
        self._value = value

    def update(self, line: dict[str, float]) -> None:
        """Adapt alpha after a step, from the step's metrics: `held` is the mean of X."""
        if self._value is None:
            return
        excess = min(line["held"] / self._value - 1, 1.0)
        scaled = math.log1p(self.alpha * self._value) + _RATE * excess
        self.alpha = math.expm1(max(0.0, scaled)) / self._value
