"""Messages and progress on stderr; stdout is reserved for data. The only maker of rich consoles."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.text import Text

from fpocli.system.bar import Bar, duration, number, rate_texts
from fpocli.system.live import live_view
from fpocli.system.output import output, write_json
from fpocli.system.ranks import is_first_rank

# Without a terminal, progress is a line: the first after so many seconds, then every so many.
_FIRST_LINE, _EVERY = 2.0, 30.0


def say(text: str) -> None:
    """Print a message, from rank 0 alone; nothing with --quiet."""
    if not output.quiet and is_first_rank():
        _print("message", text)


def warn(text: str) -> None:
    """Print what may spoil a result, from rank 0 alone, also with --quiet."""
    if is_first_rank():
        _print("warning", text)


def show_error(message: str, hint: str = "") -> None:
    """Print why the command fails, and what to do about it."""
    if output.json_logs:
        write_json("error", message=message, hint=hint)
        return
    _stderr().print(Text.assemble(("error: ", "bold red"), message))
    if hint:
        _stderr().print(Text.assemble(("hint: ", "bold"), hint))


def _print(event: str, text: str) -> None:
    if output.json_logs:
        write_json(event, message=text.strip())
    else:
        _stderr().print(text)


@contextmanager
def progress(description: str, total: float | None, done: float = 0) -> Iterator[Bar]:
    """Progress of work that can take more than two seconds: a live view on a terminal, else lines.

    Args:
        description: what is being done.
        total: number of units; None if it is unknown.
        done: units that were done before, by an earlier command or another process.

    Only rank 0 shows it. If the work fails, the view disappears, so that the error stands alone.
    """
    bar = Bar(description, total, done)
    if output.quiet or not is_first_rank():
        yield bar
    elif not output.json_logs and _is_interactive(_stderr()):
        with live_view(bar, _stderr()):
            yield bar
    else:
        lines = _Lines(bar)
        bar.when_changed = lines.print_if_due
        yield bar
        lines.close()


class _Lines:
    """Prints a bar now and then, as text or JSON."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._printed: tuple[float, dict[str, float]] | None = None
        self._due = time.monotonic() + _FIRST_LINE

    def print_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            self._print()

    def close(self) -> None:
        """Print the last line, if it says more than earlier ones; of short work as JSON alone."""
        bar = self._bar
        if (self._printed or output.json_logs) and bar.done and self._printed != _state(bar):
            self._print()

    def _print(self) -> None:
        bar = self._bar
        self._printed = _state(bar)
        left = bar.left
        if output.json_logs:
            write_json(
                "progress",
                description=bar.description,
                done=bar.done,
                total=bar.total,
                seconds=bar.seconds,
                rate=bar.rate,
                left=left,
                **{f"{name}_per_second": rate for name, rate in bar.rates.items()},
                metrics=bar.last,
            )
            return
        total = f" of {bar.total:,.0f}" if bar.total else ""
        parts = [f"{bar.description}: {int(bar.done):,}{total} in {duration(bar.seconds)}"]
        if left is not None:
            parts.append(f"about {duration(left)} left")
        parts += rate_texts(bar)
        parts += [f"{name} {number(value)}" for name, value in bar.last.items()]
        _stderr().print(", ".join(parts))


def _state(bar: Bar) -> tuple[float, dict[str, float]]:
    return bar.done, bar.last


def data_console(width: int | None = None) -> Console:
    """For the tables on stdout.

    Args:
        width: in columns; None for that of the terminal, in which long lines are not broken.
    """
    return _console(stderr=False, width=width)


@cache
def _stderr() -> Console:
    return _console(stderr=True, width=None)


def _console(*, stderr: bool, width: int | None) -> Console:
    # rich itself takes NO_COLOR as no colours, and leaves bold text (https://no-color.org).
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr,
        width=width,
        soft_wrap=width is None,
        color_system=None if plain else "auto",
        highlight=False,
        markup=False,
    )


def _is_interactive(console: Console) -> bool:
    """Whether the cursor can be moved. FORCE_COLOR, which rich reads as well, is about colours."""
    return console.is_interactive and console.file.isatty()
