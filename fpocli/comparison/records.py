"""What is known of every run of a grid: settings, results, curve, memory, pairs and verdicts; runs
by the settings that tell them apart, and Markdown tables of them."""

import json
from typing import Any

import numpy as np

from fpocli.comparison.grid import Grid, Run
from fpocli.comparison.judge_script import matches
from fpocli.comparison.verdicts import grade_difference, read_grades, read_verdicts
from fpocli.evaluation.measure import read_measurements
from fpocli.evaluation.summary import per_pair
from fpocli.training.run_folder import read_metrics

Record = dict[str, Any]
# The first steps of a run allocate more, or less, than the others; the paper averages over 1,000.
_STEPS = 1000
# Settings that do not tell kinds of runs apart.
_NO_DIFFERENCE = ("seed", "out", "cache", "overwrite")


def collect(grid: Grid) -> list[Record]:
    """A record for each run: its settings, eval.json, curve, time, memory and verdicts."""
    return [
        {
            "name": run.name,
            "baseline": grid.is_baseline(run),
            "settings": run.settings,
            "eval": json.loads(run.evaluate.result.read_text()),
            **_training(run),
            "verdicts": _verdicts(grid, run),
        }
        for run in grid.runs
    ]


def _training(run: Run) -> Record:
    """What metrics.jsonl says: the held-out curve, time and memory; none for the reference."""
    if run.train is None:
        return {"curve": [], "seconds": None, "memory_gb": None, "peak_memory_gb": None}
    lines = read_metrics(run.folder)
    train = [line for line in lines if line["split"] == "train"]
    held = [line["memory_gb"] for line in train[:_STEPS] if "memory_gb" in line]
    # With --measure-kl the reference may be in memory as well, for any method.
    from_store = run.settings.get("distributions", "0") != "0" and not run.settings["exact_kl"]
    own_memory = from_store or not run.settings["measure_kl"]
    return {
        "curve": [line for line in lines if line["split"] == "eval"],
        "seconds": sum(line["seconds"] for line in train),
        "memory_gb": float(np.mean(held)) if held and own_memory else None,
        "peak_memory_gb": max(line["peak_memory_gb"] for line in train) if own_memory else None,
    }


def pair_values(run: Run) -> dict[str, np.ndarray]:
    """The measurements of a run's held-out pairs, [N] each, by the names of docs/evaluation.md; and
    `tokens` of both responses, [N, 2]."""
    values = read_measurements(run.evaluate.result.with_name("pairs.jsonl"))
    return {"pair": values["pair"], "tokens": values["tokens"]} | per_pair(values)


def _verdicts(grid: Grid, run: Run) -> list[dict[str, Any]]:
    """The verdicts about the baseline's answers against those of this run, of the same seed."""
    records = []
    for match in matches(grid, run):
        record: dict[str, Any] = {"judge": match.judge, "temperature": match.temperature}
        names = match.baseline.stem, match.other.stem
        if found := read_verdicts(match.judge, match.folder, *names):
            record["win_rate"] = found.win_rate
            record["length_controlled"] = found.length_controlled
        if match.judge == "mt_bench":
            files = match.baseline, match.other
            grades = [read_grades(match.grades(file), file.stem) for file in files]
            record["grade"] = grade_difference(*grades)
        records.append(record)
    return records


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
        return len(set(map(text_of, values))) > 1

    def split(names: list[str]) -> dict[tuple[str, ...], list[Record]]:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for row in rows:
            groups.setdefault(tuple(text_of(row["settings"].get(n)) for n in names), []).append(row)
        return groups

    found = [name for name in keys if differ(name, rows)] or list(keys[:1])
    for name in dict.fromkeys(name for row in rows for name in row["settings"]):
        # beta, for example, differs between methods by default but does not tell runs apart.
        if name not in {*_NO_DIFFERENCE, *found} and any(
            differ(name, group) for group in split(found).values()
        ):
            found.append(name)
    return found, split(found)


def text_of(value: Any) -> str:
    """A setting in a cell; a dash for one that a run has not."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "-" if value is None else text or "-"


def markdown(title: str, heads: list[str], lines: list[list[str]], notes: list[str]) -> str:
    """A table with its title and notes."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (heads, *lines)]
    return "\n".join(
        [f"# {title}", "", rows[0], "|---" * len(heads) + "|", *rows[1:], "", *notes, ""]
    )
