"""Messages and progress for people, on stderr; stdout is left to data."""

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
from fpocli.system.signals import on_end

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """Tell something once, whatever the number of processes."""
    if is_first_rank():
        console.print(text)


@contextmanager
def progress(description: str, total: float | None) -> Iterator["Bar"]:
    """A progress bar for work that can take more than two seconds.

    Args:
        description: what is being done.
        total: how many units make the whole; None when that is unknown.

    Of several processes only the first shows it.
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
        disable=not is_first_rank(),
    )
    with bars, on_end(bars.stop):
        yield Bar(bars, description, total)


class Bar:
    """One line of progress."""

    def __init__(self, bars: Progress, description: str, total: float | None) -> None:
        self._bars = bars
        self._task = bars.add_task(description, total=total, note="")

    def advance_to(self, done: float) -> None:
        """Stand at `done` units at least, whoever did them."""
        if done > self._bars.tasks[self._task].completed:
            self._bars.update(self._task, completed=done)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount` units; `note` stands at the end of the line."""
        self._bars.update(self._task, advance=amount, note=note)
