"""Charts, as PNG files: the frame of all of them, and the paper's Figure 2. The only importer of
matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt

COLOURS = ("#2a6f97", "#c8553d")
# The paper shows the 50 largest mean activations.
_SHOWN = 50


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
