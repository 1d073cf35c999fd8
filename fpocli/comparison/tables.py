"""The runs of a grid -> the paper's tables and figures, over seeds."""

import statistics

import pandas as pd

from fpocli.comparison.columns import D_MARGIN, MEAN_MEMORY, TABLES, Column, Table
from fpocli.comparison.differences import BaselineDifferences, differences_table
from fpocli.comparison.grid import Grid
from fpocli.comparison.records import Record, grouped, markdown
from fpocli.comparison.statistics import FEWEST_PAIRS

FIGURES = ("figure2", "figure3", "figure4")
REPORTS = (*TABLES, *FIGURES)


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
        text, values = differences_table(compared, rows)
        (grid.out / "differences.md").write_text(text)
        values.to_csv(grid.out / "differences.csv", index=False)
        print(text)


def _draw(name: str, grid: Grid, rows: list[Record]) -> None:
    from fpocli.display.charts import draw_figure2
    from fpocli.evaluation import charts
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


def make_table(
    table: Table, rows: list[Record], compared: BaselineDifferences
) -> tuple[str, pd.DataFrame]:
    """Markdown with mean ± standard deviation over seeds, and a frame with both as numbers."""
    keys, groups = grouped(rows, table.keys)
    columns = table.known_columns(rows)
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
        lines.append(cells)
        records.append(record)
    heads = [*keys, "runs", *(column.title for column in columns)]
    notes = _notes(rows, columns, compared, starred=starred)
    return markdown(table.title, heads, lines, notes), pd.DataFrame(records)


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
    """The standard error over questions of the mean of several runs' values. All runs answered the
    same questions, so it is taken to be as large as that of one run."""
    if column.error is None:
        return None
    errors = [error for row in group if (error := column.error(row)) is not None]
    return statistics.mean(errors) if errors else None


def _cell(values: list[float], error: float | None, digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    spread = error if error is not None else statistics.stdev(values) if len(values) > 1 else None
    return mean if spread is None else f"{mean} ± {spread:.{digits}f}"
