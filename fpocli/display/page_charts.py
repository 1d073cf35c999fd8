"""The charts of the HTML pages, each an inline SVG. None holds text of the data: titles, names of
runs and legends are HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fpocli.display.charts import inline_chart
from fpocli.display.svg import COLOURS, TEXT

# Of the split that is measured now and then, beside the line of every step.
_DASHES = (0, (4, 2))


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Args:
        x, y: its points.
        series: number of its colour.
        sparse: it has few points: dashed, each point marked.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int
    sparse: bool = False


def curves(lines: list[Curve], name: str, label: str, y_axis: str) -> str:
    """Values over the optimiser steps."""

    def draw(axis: Any) -> None:
        for line in lines:
            dashed = {"linestyle": _DASHES, "marker": "o", "markersize": 3.5}
            style: dict[str, Any] = dashed if line.sparse else {"linewidth": 1.3}
            axis.plot(line.x, line.y, color=COLOURS[line.series], **style)
        axis.set(xlabel="step", ylabel=y_axis)
        axis.locator_params(axis="x", integer=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))

    return inline_chart(draw, name, label)


def histogram(
    edges: list[float], counts: list[list[int] | None], name: str, label: str, axes: tuple[str, str]
) -> str:
    """Counts between the same edges, one outline per series.

    Args:
        edges: of the bins, one more than there are counts.
        counts: by series; None for one that is not there.
        name, label: as for `inline_chart`.
        axes: names of both axes.
    """

    def draw(axis: Any) -> None:
        for series, values in enumerate(counts):
            if values is not None:
                axis.stairs(values, edges, color=COLOURS[series], fill=True, alpha=0.18)
                axis.stairs(values, edges, color=COLOURS[series], linewidth=1.3)
        axis.set(xlabel=axes[0], ylabel=axes[1])

    return inline_chart(draw, name, label)


def ranked(values: list[float], name: str, label: str, y_axis: str) -> str:
    """Values in falling order, as bars."""

    def draw(axis: Any) -> None:
        edges = [rank + 0.5 for rank in range(len(values) + 1)]
        axis.stairs(values, edges, color=COLOURS[0], fill=True)
        axis.set(xlabel="rank of the feature", ylabel=y_axis)

    return inline_chart(draw, name, label)


def chosen_against_rejected(points: list[list[float]], name: str, label: str) -> str:
    """Points of chosen (across) and rejected (up), and the diagonal where both are equal."""

    def draw(axis: Any) -> None:
        axis.axline((0, 0), slope=1, color=TEXT, linewidth=0.8)
        x, y = zip(*points, strict=True) if points else ((), ())
        axis.scatter(x, y, s=7, alpha=0.6, color=COLOURS[0], linewidths=0)
        axis.set(xlabel="share of chosen responses", ylabel="share of rejected responses")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))

    return inline_chart(draw, name, label)


def effects(
    rows: list[tuple[str, float, tuple[float, float]]], name: str, label: str, x_axis: str
) -> str:
    """Effects with their intervals, one per line, the first on top.

    Args:
        rows: number of the feature, effect, ends of its interval.
        name, label: as for `inline_chart`.
        x_axis: what the effect is.
    """

    def draw(axis: Any) -> None:
        for place, (_, effect, (low, high)) in enumerate(rows):
            colour = COLOURS[0] if effect > 0 else COLOURS[1]
            axis.plot((low, high), (place, place), color=colour, linewidth=1.6)
            axis.plot(effect, place, color=colour, marker="o", markersize=4.5)
        axis.axvline(0, color=TEXT, linewidth=0.8)
        axis.set_yticks(range(len(rows)), [feature for feature, *_ in rows])
        axis.set(xlabel=x_axis, ylim=(len(rows) - 0.5, -0.5))

    return inline_chart(draw, name, label, (4.6, 1.0 + 0.22 * max(len(rows), 3)))
