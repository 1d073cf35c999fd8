"""By how much the runs of a grid differ from its baseline, on the same held-out pairs."""

from typing import Any

import numpy as np
import pandas as pd

from fpocli.comparison.columns import TABLES, Column
from fpocli.comparison.grid import Grid
from fpocli.comparison.records import Record, grouped, markdown, pair_values, text_of
from fpocli.comparison.statistics import Difference, compare_means, compare_shares


class BaselineDifferences:
    """The differences of groups of runs to the baseline.

    Args:
        grid: names the baseline; without one nothing is compared.
        rows: records of its runs.
    """

    def __init__(self, grid: Grid, rows: list[Record]) -> None:
        self._values: dict[str, dict[str, np.ndarray]] = {}
        self.baseline = [row for row in rows if row["baseline"]]
        if self.baseline:
            self._values = {run.name: pair_values(run) for run in grid.runs}
        self.name = ", ".join(map(text_of, (grid.file.baseline or {}).values()))

    def difference(self, group: list[Record], column: Column) -> Difference | None:
        """Runs that differ in nothing but the seed, against the baseline's runs of the same seeds.

        Returns:
            None where the group is the baseline, or the column was not measured in both.
        """
        name = column.per_pair
        if name is None or any(row["baseline"] for row in group):
            return None
        if name.startswith("distance") and _sites(group) != _sites(self.baseline):
            return None
        seeds = {row["settings"]["seed"]: row["name"] for row in self.baseline}
        couples = [
            (self._values[row["name"]], self._values[seeds[row["settings"]["seed"]]])
            for row in group
            if row["settings"]["seed"] in seeds
        ]
        known = [
            (one[name], other[name])
            for one, other in couples
            if name in one
            and name in other
            # Stores of other data have other pairs under the same numbers.
            and np.array_equal(one["pair"], other["pair"])
            and np.array_equal(one["tokens"], other["tokens"])
        ]
        if not known:
            return None
        one, other = map(np.stack, zip(*known, strict=True))
        return (compare_shares if column.share else compare_means)(one, other)


def differences_table(
    compared: BaselineDifferences, rows: list[Record]
) -> tuple[str, pd.DataFrame]:
    """All differences in all quantities as Markdown, and as a frame."""
    keys, groups = grouped(rows, TABLES["all"].keys)
    columns = TABLES["all"].known_columns(rows)
    lines: list[list[str]] = []
    records: list[dict[str, Any]] = []
    for key, group in groups.items():
        for column in columns:
            found = compared.difference(group, column)
            if found is None:
                continue
            # Shares are in percent.
            mean, low, high = (
                (100 if column.share else 1) * value
                for value in (found.mean, found.low, found.high)
            )
            answer = "too few pairs"
            if found.enough_pairs:
                answer = "yes" if found.beyond_noise else "no"
            digits = column.digits + 1
            lines.append(
                [
                    *key, str(found.seeds), column.title, f"{mean:+.{digits}f}",
                    f"{low:+.{digits}f} to {high:+.{digits}f}",
                    "" if found.p_value is None else f"{found.p_value:.3f}", answer,
                ]
            )  # fmt: skip
            records.append(
                dict(zip(keys, key, strict=True))
                | {"seeds": found.seeds, "quantity": column.title, "difference": mean}
                | {"low": low, "high": high, "p": found.p_value, "beyond noise": answer}
            )
    heads = [*keys, "seeds", "quantity", "difference", "95 % interval", "McNemar p", "beyond noise"]
    note = (
        "Paired over the same held-out pairs, with 95 % intervals over pairs, and over seeds where "
        f"there are several. Of {len(records)} comparisons about {len(records) / 20:.0f} would be "
        "called beyond noise by chance alone."
    )
    return markdown(f"Differences to {compared.name}", heads, lines, [note]), pd.DataFrame(records)


def _sites(rows: list[Record]) -> set[str]:
    """Where the features of runs were compared."""
    return {site for row in rows for site in row["eval"].get("distance", {})}
