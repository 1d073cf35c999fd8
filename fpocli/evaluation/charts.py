"""Charts of an evaluation and of a grid, as PNG files.

Shapes: N pairs; column 0 is chosen, column 1 rejected.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fpocli.data.pairs import SIDES
from fpocli.display.charts import COLOURS, figure
from fpocli.evaluation.summary import best_kl, measured_sites


def draw_evaluation(values: dict[str, np.ndarray], out: Path) -> None:
    """reward_margin.png; where the KL was measured consistency.png, and with the reference
    bound.png.

    Args:
        values: arrays [N, 2] of fpo eval.
        out: the folder.
    """
    ratio = (values["logp"] - values["ref_logp"]) / values["tokens"]
    with figure(out / "reward_margin.png") as (axis,):
        axis.hist(ratio[:, 0] - ratio[:, 1], bins=40, color=COLOURS[0])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="reward margin (nats per token)", ylabel="pairs")
    measured, sites = best_kl(values), measured_sites(values)
    if measured is None or not sites:
        return
    kl = measured / values["tokens"]
    with figure(out / "consistency.png", len(sites)) as axes:
        for axis, site in zip(axes, sites, strict=True):
            _scatter(axis, kl, values[f"distance.{site}"])
            axis.set(xlabel="sequential KL (nats per token)", ylabel="D", title=site)
            axis.legend()
    if "kl" not in values:
        return
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
    for side, (name, colour) in enumerate(zip(SIDES, COLOURS, strict=True)):
        axis.scatter(x[:, side], y[:, side], s=9, alpha=0.6, color=colour, label=name)


def draw_figure3(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The paper's Figure 3: sequential KL of held-out chosen and rejected responses over the steps,
    the margin beta |K_l - K_w|, taken pair by pair, and the baseline's win rate against each method
    over the temperatures of sampling (Arena-Hard). The band spans the runs from least to largest.

    Args:
        runs: records of fpo compare by method; those without a measured KL, or without verdicts,
            are left out of these panels.
        file: PNG.
    """
    titles = ("KL chosen", "KL rejected", "beta times KL margin")
    names = ("kl_chosen", "kl_rejected", "kl_margin")
    with figure(file, 4) as axes:
        for method, records in runs.items():
            curves = [
                [[line[name] for name in ("step", *names)] for line in row["curve"]]
                for row in records
                if row["curve"] and "kl_chosen" in row["curve"][0]
            ]
            if not curves:
                continue
            # A run that ended early has fewer steps.
            shared = set.intersection(*({step for step, *_ in curve} for curve in curves))
            curves = [[point for point in curve if point[0] in shared] for curve in curves]
            points = np.array(curves)  # [runs, steps, 4]
            steps = points[0, :, 0]
            points[..., 3] *= records[0]["settings"]["beta"]
            for axis, values in zip(axes, np.moveaxis(points[..., 1:], -1, 0), strict=False):
                (line,) = axis.plot(steps, values.mean(0), label=method)
                low, high = values.min(0), values.max(0)
                axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        for axis, title in zip(axes, titles, strict=False):
            axis.set(title=title, xlabel="step", ylabel="nats")
        for method, records in runs.items():
            _draw_win_rates(axes[3], method, records)
        axes[3].axhline(50, color="black", linewidth=0.8)
        axes[3].set(title="win rate of the baseline (%)", xlabel="sampling temperature")
        for axis in (axes[2], axes[3]):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")


def _draw_win_rates(axis: Any, method: str, records: list[dict[str, Any]]) -> None:
    """The mean over runs, with the standard error of one run."""
    found: dict[float, list[tuple[float, float]]] = {}
    for row in records:
        for verdict in row["verdicts"]:
            if verdict["judge"] == "arena_hard" and "win_rate" in verdict:
                rate, error = verdict["win_rate"]
                found.setdefault(verdict["temperature"], []).append((rate, error or 0.0))
    if found:
        points = [(t, *np.mean(found[t], axis=0)) for t in sorted(found)]
        temperatures, rates, errors = zip(*points, strict=True)
        axis.errorbar(temperatures, rates, yerr=errors, marker="o", capsize=3, label=method)


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
            axis.bar(list(known), heights, yerr=errors, color=COLOURS[0], capsize=3)
            axis.set(title=title)
            axis.tick_params(axis="x", rotation=40)
