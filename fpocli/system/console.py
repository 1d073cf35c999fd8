"""Messages and progress on stderr; stdout is reserved for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fpocli.system.ranks import is_first_rank
from fpocli.system.signals import run_if_stopped

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
# Without a terminal, progress is a plain line: the first after so many seconds, then every so many.
_FIRST_LINE, _EVERY = 2.0, 30.0


def say(text: str) -> None:
    """Print a message once, whatever the number of processes."""
    if is_first_rank():
        console.print(text)


@contextmanager
def progress(description: str, total: float | None) -> Iterator["Bar"]:
    """Progress of work that can take more than two seconds: a bar on a terminal, else plain lines.

    Args:
        description: what is being done.
        total: number of units; None if it is unknown.

    Only rank 0 shows it. If the work fails, the bar disappears, so that the error stands alone.
    """
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (is_first_rank() and console.is_terminal),
    )

    def clear() -> None:
        bars.live.transient = True
        bars.stop()

    bar = Bar(bars, description, total)
    with bars, run_if_stopped(clear):
        try:
            yield bar
        except BaseException:
            bars.live.transient = True
            raise
        bar.close()


class Bar:
    """The progress of one piece of work."""

    def __init__(self, bars: Progress, description: str, total: float | None) -> None:
        self._bars = bars
        self._task = bars.add_task(description, total=total, note="")
        self._plain = bars.disable and is_first_rank()
        self._began = time.monotonic()
        self._due = self._began + _FIRST_LINE
        self._printed = 0.0

    def advance_to(self, done: float) -> None:
        """Set the number of units that are done, unless more are done already."""
        if done > self._bars.tasks[self._task].completed:
            self._bars.update(self._task, completed=done)
            self._print_if_due()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` units; `note` is shown at the end of the line."""
        self._bars.update(self._task, advance=amount, note=note)
        self._print_if_due()

    def close(self) -> None:
        """Print the last line, if earlier ones were printed and it says more."""
        if self._plain and 0 < self._printed < self._bars.tasks[self._task].completed:
            self._print()

    def _print_if_due(self) -> None:
        if self._plain and time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            self._print()

    def _print(self) -> None:
        task = self._bars.tasks[self._task]
        self._printed = task.completed
        done = f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total else "")
        seconds = time.monotonic() - self._began
        line = f"{task.description}: {done} in {seconds:,.0f} s"
        if task.total and 0 < task.completed < task.total:
            left = seconds * (task.total - task.completed) / task.completed
            line += f", about {left:,.0f} s left"
        console.print(", ".join(filter(None, [line, task.fields["note"]])))
