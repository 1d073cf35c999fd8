"""A warning where the chosen responses become much less likely while the rewards rise.

A pairwise loss looks at differences only, so both responses may lose probability, the rejected one
faster. The model then writes neither.
"""

from collections import deque

from fpocli.system.console import warn

# Steps that are averaged, and the fall in nats per token that is warned of: a perplexity of the
# chosen responses 1.6 times as high as before.
_STEPS, _FALL = 10, 0.5


class ChosenFall:
    """Watches the metrics of the training steps, and warns once.

    Args:
        steps: of the run; of one that is shorter than the average, all are averaged.
        from_reference: whether training starts from the reference, where nothing has changed yet;
            else the first steps are what later ones are compared with, as for the margin.
    """

    def __init__(self, steps: int, *, from_reference: bool) -> None:
        self._steps, self._from_reference = min(steps, _STEPS), from_reference
        self._start: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=self._steps)
        self._warned = False

    def watch(self, line: dict[str, float]) -> None:
        """Look at one line of metrics."""
        self._recent.append((line["average_logp_chosen_change"], line["margin"]))
        if len(self._recent) < self._steps:
            return
        change, margin = (sum(values) / self._steps for values in zip(*self._recent, strict=True))
        if self._start is None:
            self._start = (0.0 if self._from_reference else change, margin)
        fall, rise = self._start[0] - change, margin - self._start[1]
        if fall > _FALL and rise > 0 and not self._warned:
            self._warned = True
            warn(
                f"warning: over the last {self._steps} steps the chosen responses are less likely "
                f"than at the start, by {fall:.2f} nats per token, while the margin of the rewards "
                "has risen: both responses become less likely. Try --sft-weight 0.1, which holds "
                "the chosen one, or a lower --lr"
            )
