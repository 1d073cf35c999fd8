"""Charts, as PNG files or as parts of a page: the frame of all of them, and the paper's Figure 2.
The only importer of matplotlib."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from fpocli.display.svg import GRID, TEXT, inline_svg

mpl.use("agg")
from matplotlib import pyplot as plt

COLOURS = ("#2a6f97", "#c8553d")
# The paper shows the 50 largest mean activations.
_SHOWN = 50
# Text stays text, is never read as mathematics, and has the page's colours.
_INLINE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
}


@contextmanager
def figure(file: Path, panels: int = 1) -> Iterator[list[Any]]:
    """The axes of a row of panels; the file is written at the end."""
    made, axes = plt.subplots(
        1, panels, figsize=(4.8 * panels, 3.8), squeeze=False, layout="constrained"
    )
    try:
        yield list(axes[0])
        made.savefig(file, dpi=150)
    finally:
        plt.close(made)


def inline_chart(
    draw: Callable[[Any], None], name: str, label: str, size: tuple[float, float] = (4.6, 2.9)
) -> str:
    """A chart as an SVG that is a part of a page.

    Args:
        draw: draws on the axes it gets, in the colours of svg.py.
        name: of the chart, unlike those of others on the page.
        label: what it shows, for screen readers.
        size: width and height in inches.
    """
    document = io.StringIO()
    with mpl.rc_context(_INLINE | {"svg.hashsalt": name}):
        made, axis = plt.subplots(figsize=size, layout="constrained")
        try:
            draw(axis)
            # Without a date, so that the same data give the same page.
            about = {"Date": None, "Creator": None}
            made.savefig(document, format="svg", transparent=True, metadata=about)
        finally:
            plt.close(made)
    return inline_svg(document.getvalue(), name, label)


def draw_figure2(means: dict[str, np.ndarray], file: Path) -> None:
    """The paper's Figure 2, left: the largest mean activations, by rank.

    Args:
        means: by site the mean pooled features over all responses, [m].
        file: PNG.
    """
    with figure(file, max(len(means), 1)) as axes:
        for axis, (site, mean) in zip(axes, means.items(), strict=False):
            largest = np.sort(mean)[::-1][:_SHOWN]
            axis.bar(range(1, len(largest) + 1), largest, color=COLOURS[0], width=1.0)
            axis.set(xlabel="rank of the feature", ylabel="mean activation", title=site)
