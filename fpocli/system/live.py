"""The live view of a piece of work on a terminal: a bar, its rates, and sparklines of its values.

⠹ Training ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 12/500 0:01:02 40 min left
  3.251 pairs/s  1,234 tokens/s
  loss             ████▇▇▆▅▄▃▂▁   0.6916
  margin           ▁▁▁▂▂▃▄▅▆▆▇█  0.01234
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fpocli.system.bar import Bar, duration, number, rate_texts
from fpocli.system.signals import run_if_stopped
from fpocli.system.sparkline import sparkline

# Drawing takes milliseconds in which the work may wait, so it is done seldom.
_PER_SECOND = 4
# Columns of the bar and of a sparkline: at most, and at least, or else they are left out.
_WIDEST, _NARROWEST = 40, 5


@contextmanager
def live_view(bar: Bar, console: Console) -> Iterator[None]:
    """Show `bar` in place while this context lasts.

    Afterwards the bar and its rates stay, or nothing if the work has failed.
    """
    view = _View(bar)
    # stdout is for data, and never redirected to these messages.
    live = Live(view, console=console, refresh_per_second=_PER_SECOND, redirect_stdout=False)

    def clear() -> None:
        live.transient = True
        live.stop()

    with live, run_if_stopped(clear):
        try:
            yield
        except BaseException:
            live.transient = True
            raise
        view.ended = True


class _View:
    def __init__(self, bar: Bar) -> None:
        self.bar, self.ended = bar, False
        self._spinner = Spinner("dots", style="progress.spinner")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._head(options.max_width)
        if rates := rate_texts(self.bar):
            yield Text("  " + "  ".join(rates), no_wrap=True)
        if self.bar.history and not self.ended:
            yield self._sparklines(options)

    def _head(self, width: int) -> Table:
        bar = self.bar
        total = "" if bar.total is None else f"/{bar.total:,.0f}"
        texts = [(str(timedelta(seconds=int(bar.seconds))), "progress.elapsed")]
        if bar.done or total:
            texts.insert(0, (f"{int(bar.done):,}{total}", "progress.download"))
        if (left := bar.left) is not None and not self.ended:
            texts.append((f"{duration(left)} left", "progress.remaining"))
        room = width - len(f"⠹ {bar.description} ") - sum(len(text) + 1 for text, _ in texts)
        if room < 0:
            texts = [(text, style) for text, style in texts if style != "progress.elapsed"]
        first = Text(" ") if self.ended else self._spinner
        row: list[RenderableType] = [first, Text(bar.description)]
        if room >= _NARROWEST:
            shape = ProgressBar(bar.total, bar.done, min(room, _WIDEST), pulse=bar.total is None)
            row.append(shape)
        return _grid([*row, *(Text(text, style) for text, style in texts)])

    def _sparklines(self, options: ConsoleOptions) -> Table:
        history = self.bar.history
        values = [number(series[-1]) for series in history.values()]
        room = options.max_width - max(map(len, history)) - max(map(len, values)) - 4
        if room < _NARROWEST or options.ascii_only:
            room = 0
        rows: list[list[RenderableType]] = [
            [Text(f"  {name}"), Text(sparkline(series, min(room, _WIDEST))), Text(value)]
            for (name, series), value in zip(history.items(), values, strict=True)
        ]
        table = _grid(*rows)
        table.columns[-1].justify = "right"
        return table


def _grid(*rows: list[RenderableType]) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for _ in rows[0]:
        grid.add_column(no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid
