"""What is known of every run of a grid: settings, results, curve, memory, pairs and verdicts."""

import json
from typing import Any

import numpy as np

from fpocli.comparison.grid import Grid, Run
from fpocli.comparison.judge_script import is_baseline, judged_folder
from fpocli.comparison.verdicts import Verdicts, read_verdicts
from fpocli.config import JUDGES
from fpocli.evaluation.measure import read_pairs
from fpocli.evaluation.summary import per_pair

Row = dict[str, Any]
# The first steps of a run allocate more, or less, than the others; the paper averages over 1,000.
_STEPS = 1000


def collect(grid: Grid) -> list[Row]:
    """A record for each run: its settings, eval.json, curve, time, memory and verdicts."""
    verdicts = read_verdicts(judged_folder(grid))
    rows = []
    for run in grid.runs:
        lines = [
            json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        ]
        train = [line for line in lines if line["split"] == "train"]
        # With --measure-kl the reference was in memory as well, for any method.
        own_memory = not run.settings["measure_kl"]
        held = [line["memory_gb"] for line in train[:_STEPS] if "memory_gb" in line]
        rows.append(
            {
                "name": run.name,
                "baseline": is_baseline(grid, run),
                "settings": run.settings,
                "eval": json.loads(run.evaluate.result.read_text()),
                "curve": [line for line in lines if line["split"] == "eval"],
                "seconds": sum(line["seconds"] for line in train),
                "memory_gb": float(np.mean(held)) if held and own_memory else None,
                "peak_memory_gb": max(line["peak_memory_gb"] for line in train)
                if own_memory
                else None,
                "verdicts": _verdicts(grid, run, verdicts),
            }
        )
    return rows


def pair_values(run: Run) -> dict[str, np.ndarray]:
    """The measurements of a run's held-out pairs, [N] each, by the names of docs/evaluation.md."""
    values = read_pairs(run.evaluate.result.with_name("pairs.jsonl"))
    return {"pair": values["pair"]} | per_pair(values)


def _verdicts(grid: Grid, run: Run, found: Verdicts) -> list[dict[str, Any]]:
    """The verdicts about the baseline's answers against those of this run, of the same seed."""
    if is_baseline(grid, run):
        return []
    own = [
        other
        for other in grid.runs
        if is_baseline(grid, other) and other.settings["seed"] == run.settings["seed"]
    ]
    records = []
    for judge in JUDGES:
        for answers in sorted((run.folder / "eval" / judge / "model_answer").glob("*")):
            ending = answers.stem.removeprefix(run.name)
            for baseline in own:
                names = judge, baseline.name + ending, answers.stem
                record: dict[str, Any] = {"judge": judge, "temperature": _temperature(ending)}
                if duel := found.duel(*names):
                    record["win_rate"] = duel.win_rate
                    record["length_controlled"] = duel.length_controlled
                if grade := found.grade(*names):
                    record["grade"] = grade
                if len(record) > 2:
                    records.append(record)
    return records


def _temperature(ending: str) -> float | None:
    """0.7 of "-t0.7"; None of answers at the temperatures of their categories."""
    return float(ending.removeprefix("-t")) if ending else None
