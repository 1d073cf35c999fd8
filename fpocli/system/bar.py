"""The progress of one piece of work, in numbers: how much is done, how fast, and its last values.

A thread draws it while the work goes on, so a dictionary is replaced by a new one, never changed.
"""

import time
from collections.abc import Callable

# Values of each metric that are kept for the sparklines.
_KEPT = 40


class Bar:
    """The progress of one piece of work.

    Args:
        description: what is being done.
        total: number of units; None if it is unknown.
        done: units that were done before, which say nothing about the speed.
    """

    def __init__(self, description: str, total: float | None, done: float = 0) -> None:
        self.description, self.total, self.done = description, total, done
        self.history: dict[str, tuple[float, ...]] = {}
        self.when_changed: Callable[[], None] = lambda: None
        self._began = self._last = time.monotonic()
        self._before, self._counted = done, 0.0
        self._counts: dict[str, float] = {}

    def advance(self, amount: float = 1, **counts: float) -> None:
        """Add `amount` units.

        Args:
            amount: of units.
            counts: what these units and those since the last count consisted of, such as tokens=90.
        """
        done = self.done + amount
        # Fractions of a unit, such as those of micro-batches, add up to almost one.
        whole = round(done)
        self.done = whole if abs(done - whole) < 1e-6 else done
        if counts:
            self._counts = {n: self._counts.get(n, 0.0) + counts[n] for n in counts}
            self._counted = self.done - self._before
        self._last = time.monotonic()
        self.when_changed()

    def show(self, values: dict[str, float]) -> None:
        """Show these values, and in a terminal those before them; the same names every time."""
        self.history = {
            name: (*self.history.get(name, ()), float(value))[-_KEPT:]
            for name, value in values.items()
        }
        self.when_changed()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Units per second since the work began; 0 if none is done yet."""
        # Up to the last unit, as the time since then belongs to the next one.
        seconds = self._last - self._began
        return (self.done - self._before) / seconds if seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest is expected to take; None if that is unknown or nothing is left."""
        rate = self.rate
        if not self.total or not rate or self.done >= self.total:
            return None
        return max(0.0, (self.total - self.done) / rate - (time.monotonic() - self._last))

    @property
    def rates(self) -> dict[str, float]:
        """What was counted, per second, by name.

        Units that are not counted yet are taken to be like the others.
        """
        if not self._counted or not self.rate:
            return {}
        return {name: self.rate * count / self._counted for name, count in self._counts.items()}

    @property
    def last(self) -> dict[str, float]:
        """The last values, by name."""
        return {name: values[-1] for name, values in self.history.items()}


def rate_texts(bar: Bar) -> list[str]:
    """Such as "1,234 tokens/s" and "3.251 pairs/s"."""
    return [f"{number(rate)} {name}/s" for name, rate in bar.rates.items()]


def number(value: float) -> str:
    """A number for people: "12,345", "3.251", "1.2e-05"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time for people: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"
