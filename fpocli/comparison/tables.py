"""The runs of a grid -> the paper's tables and figures, over seeds."""

import math
import statistics
from typing import Any

import numpy as np
import pandas as pd

from fpocli.comparison.columns import D_MARGIN, MEAN_MEMORY, TABLES, Column, Table
from fpocli.comparison.grid import Grid
from fpocli.comparison.records import Record, pair_values
from fpocli.comparison.statistics import (
    FEWEST_PAIRS,
    Difference,
    compare_means,
    compare_shares,
)

FIGURES = ("figure2", "figure3", "figure4")
REPORTS = (*TABLES, *FIGURES)
# Settings that do not tell kinds of runs apart.
_NO_DIFFERENCE = ("seed", "out", "cache", "overwrite")
# By group of runs and column.
Differences = dict[tuple[tuple[str, ...], str], Difference]


def write_reports(grid: Grid, rows: list[Record]) -> None:
    """Write a table as NAME.md and NAME.csv, a figure as NAME.png, and print the tables."""
    compared = BaselineDifferences(grid, rows)
    for name in grid.file.reports:
        if name in TABLES:
            text, values = make_table(TABLES[name], rows, compared)
            (grid.out / f"{name}.md").write_text(text)
            values.to_csv(grid.out / f"{name}.csv", index=False)
            print(text)
        else:
            _draw(name, grid, rows)
    if grid.file.baseline is not None:
        text, values = compared.table()
        (grid.out / "differences.md").write_text(text)
        values.to_csv(grid.out / "differences.csv", index=False)
        print(text)


def _draw(name: str, grid: Grid, rows: list[Record]) -> None:
    from fpocli.evaluation import charts
    from fpocli.report.charts import draw_figure2
    from fpocli.store.reader import Store

    file = grid.out / f"{name}.png"
    _, groups = grouped(rows, ("method",))
    runs = {", ".join(key): group for key, group in groups.items()}
    if name == "figure2":
        store = Store.open(grid.runs[0].evaluate.settings["cache"])
        draw_figure2({site: store.mean(site) for site in store.sites}, file)
    elif name == "figure3":
        charts.draw_figure3(runs, file)
    else:
        panels = {"mean memory of training (GB)": MEAN_MEMORY, "D margin": D_MARGIN}
        charts.draw_figure4(
            {
                title: {method: column.known(group) for method, group in runs.items()}
                for title, column in panels.items()
            },
            file,
        )


class BaselineDifferences:
    """The differences of every group of runs to the baseline, on the same held-out pairs.

    Args:
        grid: names the baseline; without one nothing is compared.
        rows: records of its runs.
    """

    def __init__(self, grid: Grid, rows: list[Record]) -> None:
        self._values: dict[str, dict[str, np.ndarray]] = {}
        self.baseline = [row for row in rows if row["baseline"]]
        if self.baseline:
            self._values = {run.name: pair_values(run) for run in grid.runs}
        self.name = ", ".join(map(_text, (grid.file.baseline or {}).values()))
        self._rows = rows

    def difference(self, group: list[Record], column: Column) -> Difference | None:
        """A group of runs against the baseline's runs of the same seeds; None where the group is
        the baseline or the column was not measured in both."""
        if column.per_pair is None or any(row["baseline"] for row in group):
            return None
        seeds = {row["settings"]["seed"]: row["name"] for row in self.baseline}
        couples = [
            (self._values[row["name"]], self._values[seeds[row["settings"]["seed"]]])
            for row in group
            if row["settings"]["seed"] in seeds
        ]
        known = [both for both in couples if all(column.per_pair in values for values in both)]
        # Stores of other data have other pairs.
        known = [both for both in known if np.array_equal(both[0]["pair"], both[1]["pair"])]
        if column.per_pair.startswith("distance") and _sites(group) != _sites(self.baseline):
            return None
        if not known:
            return None
        one, other = (np.stack([both[side][column.per_pair] for both in known]) for side in (0, 1))
        return (compare_shares if column.share else compare_means)(one, other)

    def table(self) -> tuple[str, pd.DataFrame]:
        """All differences as Markdown, and as a frame."""
        table = TABLES["all"]
        keys, groups = grouped(self._rows, table.keys)
        columns = [c for c in table.columns if c.per_pair and c.known(self._rows)]
        records: list[dict[str, Any]] = []
        for key, group in groups.items():
            for column in columns:
                found = self.difference(group, column)
                if found is not None:
                    scale = 100 if column.share else 1
                    records.append(
                        dict(zip(keys, key, strict=True))
                        | {
                            "quantity": column.title,
                            "difference": scale * found.mean,
                            "low": scale * found.low,
                            "high": scale * found.high,
                            "p": found.p_value,
                            "beyond noise": _answer(found),
                            "digits": column.digits + 1,
                        }
                    )
        heads = [*keys, "quantity", "difference", "95 % interval", "McNemar p", "beyond noise"]
        lines = [
            f"# Differences to {self.name}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
        ]
        for record in records:
            digits = record.pop("digits")
            low, high = (f"{record[side]:+.{digits}f}" for side in ("low", "high"))
            cells = [record[name] for name in (*keys, "quantity")]
            cells += [f"{record['difference']:+.{digits}f}", f"{low} to {high}"]
            cells.append("" if record["p"] is None else f"{record['p']:.3f}")
            cells.append(record["beyond noise"])
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            "Paired over the same held-out pairs, with 95 % intervals over pairs, and over seeds "
            f"where there are several. Of {len(records)} comparisons about "
            f"{len(records) / 20:.0f} would be called beyond noise by chance alone.",
        ]
        return "\n".join(lines) + "\n", pd.DataFrame(records)


def _answer(found: Difference) -> str:
    if not found.enough_pairs:
        return "too few pairs"
    return "yes" if found.beyond_noise else "no"


def _sites(rows: list[Record]) -> set[str]:
    """Where the features of runs were compared."""
    return {site for row in rows for site in row["eval"].get("distance", {})}


def make_table(
    table: Table, rows: list[Record], compared: BaselineDifferences
) -> tuple[str, pd.DataFrame]:
    """Markdown with mean ± standard deviation over seeds, and a frame with both as numbers."""
    keys, groups = grouped(rows, table.keys)
    columns = [column for column in table.columns if column.known(rows)]
    lines, records, starred = [], [], False
    for key, group in groups.items():
        record: Record = dict(zip(keys, key, strict=True)) | {"runs": len(group)}
        cells = [*key, str(len(group))]
        for column in columns:
            known, error = column.known(group), _error(column, group)
            found = compared.difference(group, column)
            star = "\\*" if found is not None and found.beyond_noise else ""
            starred = starred or bool(star)
            cells.append(_cell(known, error, column.digits) + star)
            record[column.title] = statistics.mean(known) if known else None
            record[f"{column.title}, std"] = statistics.stdev(known) if len(known) > 1 else None
            if column.error:
                record[f"{column.title}, standard error"] = error
        lines.append("| " + " | ".join(cells) + " |")
        records.append(record)
    heads = [*keys, "runs", *(column.title for column in columns)]
    text = "\n".join(
        [
            f"# {table.title}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
            *lines,
            "",
            *_notes(rows, columns, compared, starred=starred),
        ]
    )
    return text + "\n", pd.DataFrame(records)


def _notes(
    rows: list[Record], columns: list[Column], compared: BaselineDifferences, *, starred: bool
) -> list[str]:
    """What the cells mean."""
    splits = sorted({f"{row['eval']['split']} ({row['eval']['pairs']:,} pairs)" for row in rows})
    notes = [
        f"Measured on the split {', '.join(splits)}. ± is the standard deviation over runs that "
        "differ in nothing but the seed."
    ]
    if compared.baseline:
        few = min(row["eval"]["pairs"] for row in rows) < FEWEST_PAIRS
        notes.append(
            f"A star marks a difference to {compared.name} that is beyond noise (differences.md)."
            if starred
            else f"There are too few pairs to tell differences to {compared.name} from noise."
            if few
            else f"No difference to {compared.name} is beyond noise (differences.md)."
        )
    found = dict.fromkeys(column.note for column in columns if column.note)
    notes += [note.format(baseline=compared.name) for note in found]
    return notes


def _error(column: Column, group: list[Record]) -> float | None:
    """The standard error of a mean of runs that have one each."""
    if column.error is None:
        return None
    errors = [error for row in group if (error := column.error(row)) is not None]
    return math.sqrt(sum(error**2 for error in errors)) / len(errors) if errors else None


def grouped(
    rows: list[Record], keys: tuple[str, ...]
) -> tuple[list[str], dict[tuple[str, ...], list[Record]]]:
    """Runs that differ in nothing but the seed, in order, and the settings that tell them apart.

    Args:
        rows: records of the runs.
        keys: settings to tell them apart by, if they differ; others are added if necessary.
    """

    def differ(name: str, among: list[Record]) -> bool:
        values = [row["settings"][name] for row in among if name in row["settings"]]
        return len(set(map(_text, values))) > 1

    def split(names: list[str]) -> dict[tuple[str, ...], list[Record]]:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for row in rows:
            groups.setdefault(tuple(_text(row["settings"].get(n)) for n in names), []).append(row)
        return groups

    found = [name for name in keys if differ(name, rows)] or list(keys[:1])
    for name in dict.fromkeys(name for row in rows for name in row["settings"]):
        # beta, for example, differs between methods by default but does not tell runs apart.
        if name not in {*_NO_DIFFERENCE, *found} and any(
            differ(name, group) for group in split(found).values()
        ):
            found.append(name)
    return found, split(found)


def _text(value: Any) -> str:
    """A setting in a cell; a dash for one that a run has not."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "-" if value is None else text or "-"


def _cell(values: list[float], error: float | None, digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    spread = error if error is not None else statistics.stdev(values) if len(values) > 1 else None
    return mean if spread is None else f"{mean} ± {spread:.{digits}f}"
