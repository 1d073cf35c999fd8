"""Charts, as PNG files. The only importer of matplotlib.

Shapes: N pairs; column 0 is chosen, column 1 rejected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt

from fpocli.evaluation.summary import measured_sites

SIDES = ("chosen", "rejected")
_COLOURS = ("#2a6f97", "#c8553d")


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


def draw_evaluation(values: dict[str, np.ndarray], out: Path) -> None:
    """reward_margin.png; and where the KL was measured consistency.png and bound.png.

    Args:
        values: arrays [N, 2] of fpo eval.
        out: the folder.
    """
    ratio = (values["logp"] - values["ref_logp"]) / values["tokens"]
    with figure(out / "reward_margin.png") as (axis,):
        axis.hist(ratio[:, 0] - ratio[:, 1], bins=40, color=_COLOURS[0])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="reward margin (nats per token)", ylabel="pairs")
    if "kl" not in values:
        return
    kl = values["kl"] / values["tokens"]
    sites = measured_sites(values)
    if not sites:
        return
    with figure(out / "consistency.png", len(sites)) as axes:
        for axis, site in zip(axes, sites, strict=True):
            _scatter(axis, kl, values[f"distance.{site}"])
            axis.set(xlabel="sequential KL (nats per token)", ylabel="D", title=site)
            axis.legend()
    with figure(out / "bound.png", len(sites)) as axes:
        for axis, site in zip(axes, sites, strict=True):
            bound = values[f"bound.{site}"] / values["tokens"]
            _scatter(axis, kl, bound)
            axis.plot([kl.min(), kl.max()], [kl.min(), kl.max()], color="black", linewidth=0.8)
            # The bound lies orders of magnitude above.
            axis.set(yscale="log" if kl.min() > 0 and bound.min() > 0 else "linear")
            axis.set(xlabel="KL (nats per token)", ylabel="Appendix B's bound", title=site)
            axis.legend()


def _scatter(axis: Any, x: np.ndarray, y: np.ndarray) -> None:
    for side, (name, colour) in enumerate(zip(SIDES, _COLOURS, strict=True)):
        axis.scatter(x[:, side], y[:, side], s=9, alpha=0.6, color=colour, label=name)


def draw_figure3(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The paper's Figure 3: sequential KL of held-out chosen and rejected responses over the steps,
    and the margin |K_l - K_w|, taken pair by pair. The band spans the runs from least to largest.

    Args:
        runs: records of fpo compare by method; those without a measured KL are left out.
        file: PNG.
    """
    titles = ("KL chosen", "KL rejected", "KL margin")
    names = ("kl_chosen", "kl_rejected", "kl_margin")
    with figure(file, 3) as axes:
        for method, records in runs.items():
            curves = [
                [[line[name] for name in ("step", *names)] for line in row["curve"]]
                for row in records
                if row["curve"] and "kl_chosen" in row["curve"][0]
            ]
            if not curves:
                continue
            points = np.array(curves)  # [runs, steps, 4]
            steps = points[0, :, 0]
            for axis, values in zip(axes, np.moveaxis(points[..., 1:], -1, 0), strict=True):
                (line,) = axis.plot(steps, values.mean(0), label=method)
                low, high = values.min(0), values.max(0)
                axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        for axis, title in zip(axes, titles, strict=True):
            axis.set(title=title, xlabel="step", ylabel="nats")
        if axes[-1].lines:
            axes[-1].legend(fontsize="small")


def draw_figure4(panels: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The paper's Figure 4: bars of means by method, with the standard deviation over runs.

    Args:
        panels: by title and method the values of its runs; methods without any are left out.
        file: PNG.
    """
    with figure(file, len(panels)) as axes:
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            known = {method: found for method, found in values.items() if found}
            heights = [np.mean(found) for found in known.values()]
            errors = [np.std(found) for found in known.values()]
            axis.bar(list(known), heights, yerr=errors, color=_COLOURS[0], capsize=3)
            axis.set(title=title)
            axis.tick_params(axis="x", rotation=40)
