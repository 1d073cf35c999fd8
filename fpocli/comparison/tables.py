"""The runs of a grid -> the paper's tables and figures, over seeds.

Win rates need a judge and are not made here; fpo eval --generate writes what judges read.
"""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fpocli.comparison.grid import Grid, Run

Row = dict[str, Any]
# Of the answers whose entropy the tables show; the default of fpo eval.
_TEMPERATURE = 0.7
# Settings that do not tell kinds of runs apart.
_NO_DIFFERENCE = ("seed", "out", "cache", "overwrite")


@dataclass(frozen=True)
class Column:
    """A measured column.

    Args:
        title: its heading, with the unit.
        value: of a run's record; None where it was not measured.
        digits: after the point.
    """

    title: str
    value: Callable[[Row], float | None]
    digits: int

    def known(self, rows: list[Row]) -> list[float]:
        """Its values for the runs in which it was measured."""
        return [value for row in rows if (value := self.value(row)) is not None]


def _path(*names: str) -> Callable[[Row], float | None]:
    """A nested value of a record."""

    def value(row: Row) -> float | None:
        found: Any = row
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    return value


def _percent(name: str) -> Callable[[Row], float]:
    """A share of fpo eval in percent."""
    return lambda row: 100 * row["eval"][name]["share"]


def _entropy(row: Row) -> float | None:
    """At temperature 0.7, the same in every table, or None if that was not sampled."""
    for sampled in row["eval"].get("generation") or ():
        if sampled["temperature"] == _TEMPERATURE:
            return sampled["entropy"]
    return None


def _distance(side: str) -> Callable[[Row], float | None]:
    """The mean over sites."""

    def value(row: Row) -> float | None:
        sites = row["eval"].get("distance")
        return statistics.mean(site[side] for site in sites.values()) if sites else None

    return value


_D_MARGIN = Column("D margin", _distance("margin"), 5)
_PEAK = Column("Peak (GB)", _path("peak_memory_gb"), 2)
# The paper does not say which of the two its accuracy is, so both are shown.
_ACCURACY = (
    Column("Accuracy (%)", _percent("accuracy"), 1),
    Column("Reward acc. (%)", _percent("reward_accuracy"), 1),
)
_ENTROPY = Column(f"Entropy at T = {_TEMPERATURE} (nats)", _entropy, 3)
_PAPER = (*_ACCURACY, _ENTROPY)
_ALL = (
    *_ACCURACY,
    _ENTROPY,
    Column("KL chosen (nats)", _path("eval", "kl", "chosen"), 3),
    Column("KL rejected (nats)", _path("eval", "kl", "rejected"), 3),
    Column("KL margin", _path("eval", "kl", "margin"), 3),
    Column("D chosen", _distance("chosen"), 5),
    Column("D rejected", _distance("rejected"), 5),
    _D_MARGIN,
    Column("Time (s)", _path("seconds"), 0),
    _PEAK,
)


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: above it.
        keys: settings that tell its rows apart.
        columns: what is measured.
    """

    title: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]


TABLES = {
    "all": Table("All runs", ("method", "layer", "site", "alpha", "stop_gradient"), _ALL),
    "table2": Table("The paper's Table 2, right", ("method",), _PAPER),
    "table3": Table("The paper's Table 3", ("layer", "site", "alpha", "stop_gradient"), _PAPER),
    "table6": Table("The paper's Table 6", ("method",), _PAPER),
    "table7": Table("The paper's Table 7", ("layer",), _PAPER),
}
FIGURES = ("figure3", "figure4")
REPORTS = (*TABLES, *FIGURES)


def collect(runs: list[Run]) -> list[Row]:
    """A record for each run: its settings, eval.json, curve, time and memory."""
    rows = []
    for run in runs:
        lines = [
            json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        ]
        train = [line for line in lines if line["split"] == "train"]
        rows.append(
            {
                "name": run.name,
                "settings": run.settings,
                "eval": json.loads(run.evaluate.result.read_text()),
                "curve": [line for line in lines if line["split"] == "eval"],
                "seconds": sum(line["seconds"] for line in train),
                # With --measure-kl the reference was in memory as well, for any method.
                "peak_memory_gb": None
                if run.settings["measure_kl"]
                else max(line["peak_memory_gb"] for line in train),
            }
        )
    return rows


def write_reports(grid: Grid, rows: list[Row]) -> None:
    """Write a table as NAME.md and NAME.csv, a figure as NAME.png, and print the tables."""
    for name in grid.reports:
        if name in TABLES:
            text, values = make_table(TABLES[name], rows)
            (grid.out / f"{name}.md").write_text(text)
            values.to_csv(grid.out / f"{name}.csv", index=False)
            print(text)
        else:
            from fpocli.evaluation.charts import draw_figure3, draw_figure4

            _, groups = grouped(rows, ("method",))
            runs = {", ".join(key): group for key, group in groups.items()}
            file = grid.out / f"{name}.png"
            if name == "figure3":
                draw_figure3(runs, file)
            else:
                panels = {"peak memory of training (GB)": _PEAK, "D margin": _D_MARGIN}
                draw_figure4(
                    {
                        title: {method: column.known(group) for method, group in runs.items()}
                        for title, column in panels.items()
                    },
                    file,
                )


def make_table(table: Table, rows: list[Row]) -> tuple[str, pd.DataFrame]:
    """Markdown with mean ± standard deviation over seeds, and a frame with both as numbers."""
    keys, groups = grouped(rows, table.keys)
    columns = [column for column in table.columns if column.known(rows)]
    lines, records = [], []
    for key, group in groups.items():
        record: Row = dict(zip(keys, key, strict=True)) | {"runs": len(group)}
        cells = [*key, str(len(group))]
        for column in columns:
            known = column.known(group)
            cells.append(_cell(known, column.digits))
            record[column.title] = statistics.mean(known) if known else None
            record[f"{column.title}, std"] = statistics.stdev(known) if len(known) > 1 else None
        lines.append("| " + " | ".join(cells) + " |")
        records.append(record)
    heads = [*keys, "runs", *(column.title for column in columns)]
    splits = sorted({f"{row['eval']['split']} ({row['eval']['pairs']:,} pairs)" for row in rows})
    text = "\n".join(
        [
            f"# {table.title}",
            "",
            "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|",
            *lines,
            "",
            f"Measured on the split {', '.join(splits)}. ± is the standard deviation over runs "
            "that differ in nothing but the seed.",
        ]
    )
    return text + "\n", pd.DataFrame(records)


def grouped(
    rows: list[Row], keys: tuple[str, ...]
) -> tuple[list[str], dict[tuple[str, ...], list[Row]]]:
    """Runs that differ in nothing but the seed, in order, and the settings that tell them apart.

    Args:
        rows: records of the runs.
        keys: settings to tell them apart by, if they differ; others are added if necessary.
    """

    def differ(names: Iterable[str], among: list[Row]) -> list[str]:
        return [n for n in names if len({_text(row["settings"].get(n)) for row in among}) > 1]

    def split(names: list[str]) -> dict[tuple[str, ...], list[Row]]:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(_text(row["settings"].get(n)) for n in names), []).append(row)
        return groups

    found = differ(keys, rows) or list(keys[:1])
    others = [name for name in rows[0]["settings"] if name not in {*_NO_DIFFERENCE, *found}]
    # beta, for example, differs between methods by default but does not tell runs apart.
    found += [n for n in others if any(differ([n], group) for group in split(found).values())]
    return found, split(found)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
