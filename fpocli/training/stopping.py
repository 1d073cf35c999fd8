"""Which step is the best, and when a run or a command ends before the last step."""

import time
from collections.abc import Iterable
from typing import Any

from fpocli.config import LOWER_IS_BETTER, TrainConfig
from fpocli.system.ranks import Ranks


class BestStep:
    """The evaluated step at which a metric of the held-out pairs is best, for --best.

    It depends on nothing but the lines of metrics.jsonl, from which a resumed run knows it again.
    The evaluation before training does not count: it only says whether training helped at all.

    Args:
        settings: of the run; without --best no step is.
        lines: those of metrics.jsonl so far.

    Attributes:
        step: None before the first evaluation.
        value: of the metric there.
        at_start: the metric before training.
    """

    def __init__(self, settings: TrainConfig, lines: Iterable[dict[str, Any]] = ()) -> None:
        self._metric, self._patience = settings.best, settings.patience
        self._sign = -1 if self._metric in LOWER_IS_BETTER else 1
        self._since = 0
        self.step: int | None = None
        self.value = self.at_start = 0.0
        for line in lines:
            self.watch(line)

    def watch(self, line: dict[str, Any]) -> None:
        """See one line of metrics.jsonl."""
        if line["split"] != "eval" or self._metric not in line:
            return
        value = line[self._metric]
        if line["step"] == 0:
            self.at_start = value
        elif self.step is None or self._sign * value > self._sign * self.value:
            self.step, self.value, self._since = line["step"], value, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        """Whether --patience ends the run."""
        return self._patience is not None and self._since >= self._patience

    def __str__(self) -> str:
        """Which step it is, and why."""
        return (
            f"step {self.step}, whose {self._metric} of {self.value:.4g} on the held-out pairs was "
            f"the best (before training: {self.at_start:.4g})"
        )


class TimeLimit:
    """The end of this command, for --max-minutes.

    Args:
        minutes: from now; None is no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def over(self) -> bool:
        """Whether it is reached, by the clock of rank 0. All ranks must call this."""
        if self._end is None:
            return False
        return Ranks.connected().of_first(time.monotonic() >= self._end)
