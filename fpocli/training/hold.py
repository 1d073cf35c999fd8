"""Alpha that keeps the constraint's divergence at a value or below, by dual ascent (--hold).

Training maximises the preference under X <= V, where X is D or K of the rejected responses, which
the constraint acts on. Alpha plays the part of the multiplier: it rises while X is above V, falls
while it is below, and is 0 where the condition does not bind. The step is taken in
s = log(1 + alpha V), so that it has no unit: alpha V grows by a share of itself where it is large,
and by a fixed amount near 0.

Alpha is inside the sigmoid, so a very large one makes the loss huge, or u, where the chosen
response is farther away than the rejected one, and then nothing has a gradient. So what it makes of
X in u is limited; alpha is then also soon back when X is.
"""

import math

from fpocli.system.console import warn

# Change of s per step where X is twice V, which is also the largest.
_RATE = 0.1
# The largest alpha beta X, of either response: this much in u outweighs the rewards.
_MOST = 10.0
# The most steps that are averaged for the warning at the end, and how far X may be above V there.
_STEPS, _ABOVE = 50, 1.25


class HeldAlpha:
    """The weight of the constraint.

    Args:
        alpha: where it starts.
        value: V, in the unit of X; None leaves alpha as it is.
        beta: scale of the rewards.
    """

    def __init__(self, alpha: float, value: float | None, beta: float) -> None:
        self.alpha = alpha
        self._value = value
        self._beta = beta
        self._seen: list[float] = []

    def watch(self, line: dict[str, float]) -> None:
        """See the metrics of a step of an earlier command, whose alpha is known."""
        if self._value is not None:
            self._seen.append(line["held"])

    def update(self, line: dict[str, float]) -> None:
        """Adapt alpha after a step, from the step's metrics: `held` is the mean of X, and
        `held_chosen` that of the chosen responses."""
        if self._value is None:
            return
        self.watch(line)
        scaled = math.log1p(self.alpha * self._value)
        scaled += _RATE * min(line["held"] / self._value - 1, 1.0)
        most = _MOST / (self._beta * max(line["held"], line["held_chosen"], self._value))
        self.alpha = min(math.expm1(max(0.0, scaled)) / self._value, most)

    def warn_if_missed(self) -> None:
        """Say so if X ended above the value."""
        if self._value is None or not self._seen:
            return
        # X is 0 at the start, so of a short run the second half counts.
        last = self._seen[-min(_STEPS, -(-len(self._seen) // 2)) :]
        mean = sum(last) / len(last)
        if mean > _ABOVE * self._value:
            warn(
                f"warning: --hold {self._value:g} was not reached: over the last "
                f"{len(last)} steps the value is {mean:.3g} on average, and alpha ended at "
                f"{self.alpha:.3g}. More steps or a lower --lr may reach it; see `held` and "
                "`alpha` in metrics.jsonl"
            )
