"""The page of constraints.py: each method's figures, differences to the same reward without a
constraint, and differences of methods that are equally far from the reference, by KL and by D.

Its rows are those of constraints.jsonl: a run's method, alpha, seed, settings and, under "pairs",
what was measured of each held-out pair.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, machine, table, write_page

from fpocli.comparison.statistics import Difference, compare_means, compare_shares
from fpocli.display.charts import figure

LR = "2e-5"
# Each with its reward's method without a constraint.
PLAIN = {"tdpo2": "dpo", "dpo+features": "dpo", "fpo": "dpo_norm"}
COLOURS = {
    "dpo": "#777777", "tdpo2": "#2a6f97", "dpo+features": "#e09f3e", "dpo_norm": "#333333",
    "fpo": "#c8553d", "simpo": "#6a4c93",
}  # fmt: skip


class Cell(NamedTuple):
    """A method, its alpha (None without a constraint) and its learning rate."""

    method: str
    alpha: float | None
    lr: str = LR

    @property
    def variant(self) -> str:
        """What it differs in from others of its method, such as "α 2" or "lr 5e-6"."""
        if self.lr != LR:
            return f"lr {self.lr}"
        return "" if self.alpha is None else f"α {self.alpha:g}"


# Of runs, by seed: what was measured of each pair, [N], by name.
Runs = dict[int, dict[str, np.ndarray]]

# Name of a value of pairs, heading, digits.
COLUMNS = (
    ("reward_accuracy", "reward accuracy (%)", 1),
    ("reward_accuracy_per_token", "per token (%)", 1),
    ("accuracy", "accuracy (%)", 1),
    ("kl_per_token", "KL (nats per token)", 4),
    ("kl_rejected", "KL rejected (nats)", 2),
    ("kl_chosen", "KL chosen (nats)", 2),
    ("distance_rejected", "D rejected", 4),
    ("distance_chosen", "D chosen", 4),
)

# Distances from the reference at which methods are compared, and which with which: what a
# constraint buys over smaller steps, one constraint over the other, and the normalisation with and
# without a constraint.
LEVELS = {"kl_per_token": (0.2, 0.1, 0.05), "distance_rejected": (2, 1, 0.5)}
MATCHED = (
    ("tdpo2", "dpo"),
    ("dpo+features", "dpo"),
    ("dpo+features", "tdpo2"),
    ("fpo", "dpo_norm"),
    ("dpo_norm", "dpo"),
    ("fpo", "dpo+features"),
)


def report(rows: dict[Cell, list[dict[str, Any]]]) -> None:
    """The page of each cell's rows, and a figure beside it."""
    cells = {
        cell: {
            row["seed"]: {
                name: scale(name) * np.array(values) for name, values in row["pairs"].items()
            }
            for row in own
        }
        for cell, own in rows.items()
    }
    draw(cells, RESULTS / "constraints.png")
    methods = [
        [cell.method, cell.variant, str(len(runs)),
         *(mean_and_deviation(runs, name, digits) for name, _, digits in COLUMNS)]
        for cell, runs in cells.items()
    ]  # fmt: skip
    to_plain = [
        [cell.method, cell.variant, plain.method, *differences(runs, cells[plain], compare_shares)]
        for cell, runs in cells.items()
        if (plain := Cell(PLAIN.get(cell.method, cell.method), None)) in cells and plain != cell
    ]
    matched: dict[str, list[list[str]]] = {name: [] for name in LEVELS}
    for name, levels in LEVELS.items():
        for level, (one, other) in product(levels, MATCHED):
            own, others = (at_level(cells, method, name, level) for method in (one, other))
            # Interpolated shares are no counts, which McNemar's test would need.
            if found := differences(own, others, compare_means):
                matched[name].append([f"{level:g}", one, other, *found])
    titles = [title for _, title, _ in COLUMNS]
    intervals = len(COLUMNS) * (len(to_plain) + sum(map(len, matched.values())))
    first = next(iter(rows.values()))[0]
    write_page(
        "constraints",
        f"""# What each constraint buys, {datetime.now(UTC):%Y-%m-%d}

{first["training_pairs"]} training pairs (one epoch, batches of 8, learning rate {LR} where no other
is given), {first["held_out"]} held-out pairs, the same for all; prompts of at most
{first["settings"]["max_prompt_length"]} tokens, prompt and response of at most
{first["settings"]["max_length"]}; float32. Everything is measured on the held-out pairs after
training, the KL over the whole vocabulary. Reward accuracy is by S_θ − S_ref, in all and per token;
accuracy is by the log-probability per token.

{machine()}
Command: `python benchmarks/constraints.py --data PAIRS.jsonl`.

![Reward accuracy against KL and D](constraints.png)

{table(["method", "", "seeds", *titles], methods)}

± is the standard deviation over seeds.

Differences below are paired over the same pairs and seeds, with 95 % intervals over seeds and pairs
(over pairs alone where there is one seed); **bold** where 0 is outside. Of {intervals} intervals
{intervals / 20:.0f} would be by chance alone.

## Differences to the same reward without a constraint at {LR}

{table(["method", "", "to", *titles], to_plain)}

## Differences at equal KL

Between the two runs of a method and seed whose mean KL per token is next to the given one, each
pair's values are interpolated linearly, so that the mean KL per token is the given one. The runs of
tdpo2, fpo and dpo+features go over alpha from 0, those of dpo and dpo_norm over the learning rate.

{table(["nats per token", "method", "to", *titles], matched["kl_per_token"])}

## Differences at equal D

The same, with a given mean D of the rejected responses.

{table(["D rejected", "method", "to", *titles], matched["distance_rejected"])}
""",
    )


def line_of(cells: dict[Cell, Runs], method: str) -> list[Runs]:
    """The runs of a method from alpha = 0 on, or from the highest learning rate."""
    start = [Cell(PLAIN[method], None)] if method in PLAIN else []
    return [runs for cell, runs in cells.items() if cell in start or cell.method == method]


def at_level(cells: dict[Cell, Runs], method: str, name: str, level: float) -> Runs:
    """A method's values, interpolated to where the mean of one of them is `level`, of the seeds
    whose runs enclose it."""
    line = line_of(cells, method)
    found: Runs = {}
    for seed in set().union(*line):
        own = [runs[seed] for runs in line if seed in runs]
        own.sort(key=lambda run: run[name].mean())
        for one, other in pairwise(own):
            low, high = (run[name].mean() for run in (one, other))
            if low <= level <= high:
                share = (level - low) / (high - low)
                found[seed] = {key: (1 - share) * one[key] + share * other[key] for key in one}
    return found


def scale(name: str) -> int:
    """Shares are shown in percent."""
    return 100 if "accuracy" in name else 1


def mean_and_deviation(runs: Runs, name: str, digits: int) -> str:
    """Over seeds."""
    means = np.array([run[name].mean() for run in runs.values()])
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def differences(
    one: Runs, other: Runs, compare: Callable[[np.ndarray, np.ndarray], Difference]
) -> list[str]:
    """The paired difference of each column with its interval; empty without common seeds.

    Args:
        one, other: the runs.
        compare: how shares are compared.
    """
    seeds = sorted(one.keys() & other.keys())
    texts = []
    for name, _, digits in COLUMNS if seeds else ():
        parts = [np.stack([runs[seed][name] for seed in seeds]) for runs in (one, other)]
        found = (compare if scale(name) > 1 else compare_means)(*parts)
        text = f"{found.mean:+.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
        texts.append(f"**{text}**" if found.beyond_noise else text)
    return texts


def draw(cells: dict[Cell, Runs], file: Path) -> None:
    """Reward accuracy against the KL and against D of the rejected responses, and D against the KL:
    a small point for each run, and for each method a line over its alphas, from 0, or a dashed one
    over its learning rates. Bars are standard errors over pairs."""
    titles = {
        "reward_accuracy": "reward accuracy (%)",
        "kl_per_token": "KL (nats per token)",
        "distance_rejected": "D of rejected responses",
    }
    panels = (
        ("kl_per_token", "reward_accuracy"),
        ("distance_rejected", "reward_accuracy"),
        ("kl_per_token", "distance_rejected"),
    )
    with figure(file, len(panels)) as axes:
        for axis, (x, y) in zip(axes, panels, strict=True):
            for method, colour in COLOURS.items():
                own = [
                    run for cell in cells if cell.method == method for run in cells[cell].values()
                ]
                if not own:
                    continue
                single = [[run[name].mean() for run in own] for name in (x, y)]
                axis.scatter(*single, s=8, alpha=0.4, color=colour)
                # Means over seeds: of each of the line's cells and each pair.
                by_pair = [
                    [
                        np.mean([run[name] for run in runs.values()], axis=0)
                        for runs in line_of(cells, method)
                    ]
                    for name in (x, y)
                ]
                mean_x, mean_y = (np.mean(pairs, axis=1) for pairs in by_pair)
                error = np.std(by_pair[1], axis=1, ddof=1) / np.sqrt(len(by_pair[1][0]))
                style = "o-" if method in PLAIN else "o--"
                axis.errorbar(mean_x, mean_y, error, fmt=style, ms=5, lw=1.5, elinewidth=0.5,
                              color=colour, label=method)  # fmt: skip
            axis.set(xlabel=titles[x], ylabel=titles[y], xscale="log")
            if y == "distance_rejected":
                axis.set(yscale="log")
        axes[0].legend(fontsize=8)
