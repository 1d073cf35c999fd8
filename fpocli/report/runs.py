"""fpo report: what is known of one or several runs, as data; runs_page.py makes the page.

A run is a folder of fpo train, with or without an evaluation in it, or an evaluation alone: a
folder of fpo eval, such as that of the reference before training.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fpocli.config import ReportConfig
from fpocli.display.svg import SERIES
from fpocli.evaluation.evaluate import run_folder
from fpocli.evaluation.measure import read_measurements
from fpocli.evaluation.summary import per_pair
from fpocli.report.changed_features import changed_features
from fpocli.report.evaluation_table import evaluation_table
from fpocli.report.runs_page import write_runs_page
from fpocli.report.samples import side_by_side
from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import is_finite_number, read_json
from fpocli.training.run_folder import read_metrics, read_run
from fpocli.training.stopping import BestStep

# Points of a curve; longer ones are means of consecutive steps.
_POINTS = 400
_BINS = 40
# Settings that tell nothing about a run.
_NO_SETTING = ("overwrite", "trust_remote_code")
# Different for every run, or part of the method's name.
_NO_DIFFERENCE = ("out", "reward", "constraint")


def report_runs(config: ReportConfig) -> dict[str, Any]:
    """Write a page about runs, and return its numbers.

    Args:
        config: which runs, and where the page goes.

    Raises:
        UserError: a folder is neither a run nor an evaluation, its files cannot be read, or there
            are more runs than one chart can tell apart.
    """
    if len(config.runs) > SERIES:
        raise UserError(
            f"{len(config.runs)} runs are too many for one chart", f"name at most {SERIES}"
        )
    shown = describe_runs(config.runs)
    write_runs_page(shown, Path(config.html))
    if config.json:
        print(json.dumps(shown, indent=2))
    return shown


def describe_runs(named: list[str]) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        named: folders of runs or evaluations.

    Returns:
        plain values for JSON. Lists by run are in the order of `runs`: evaluations of models that
        fpo did not train first, as they are what the runs began with.
    """
    with progress("Reading the runs", None):
        found = [_read(name) for name in named]
    found.sort(key=lambda run: run["settings"] is not None)
    for run, name in zip(found, _names([run["path"] for run in found]), strict=True):
        run["name"] = name
    lines = [run.pop("lines") for run in found]
    folders = [run.pop("evaluated") for run in found]
    results = [run["evaluation"] for run in found]
    return {
        "runs": found,
        "differing": _differing([run["settings"] for run in found]),
        "curves": _curves(lines),
        "held_out": _held_out(lines, [run["best_step"] for run in found]),
        "evaluation": evaluation_table(results),
        "reward_margins": _reward_margins(folders),
        "changed_features": changed_features(
            [
                str(folder.parent) if folder and run["settings"] else None
                for folder, run in zip(folders, found, strict=True)
            ]
        ),
        "samples": side_by_side(folders),
    }


def _read(name: str) -> dict[str, Any]:
    """One run. `lines` are those of metrics.jsonl, `evaluated` is the folder of its evaluation."""
    folder = run_folder(name)
    places = [Path(name), Path(name) / "eval"] if folder is None else [folder / "eval"]
    evaluated = next((place for place in places if (place / "eval.json").is_file()), None)
    if folder is None and evaluated is None:
        raise UserError(
            f"{name} is neither a run of fpo train nor an evaluation of fpo eval",
            "name a folder with run.json, or with eval.json",
        )
    result = read_evaluation(evaluated) if evaluated else None
    about: dict[str, Any] = {"path": name, "settings": None, "store": None, "finished": None}
    lines = read_metrics(folder) if folder else []
    best = None
    if folder is not None:
        fingerprint, settings = read_run(folder)
        values = dataclasses.asdict(settings)
        about["settings"] = {n: v for n, v in values.items() if n not in _NO_SETTING}
        about["store"] = {"fingerprint": fingerprint} | _describe_store(settings.cache, fingerprint)
        about["finished"] = (folder / "final" / "config.json").is_file()
        best = BestStep(settings, lines)
    steps = [line["step"] for line in lines if line["split"] == "train"]
    seconds = [line.get("seconds", 0) for line in lines]
    return about | {
        "steps": int(max(steps)) if steps else None,
        "best_step": int(best.step) if best and best.step else None,
        "seconds": float(sum(seconds)) if steps else None,
        "evaluation": result,
        "lines": lines,
        "evaluated": evaluated,
    }


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of eval.json.

    Raises:
        UserError: it is damaged.
    """
    result = read_json(folder / "eval.json")
    if not _is_evaluation(result):
        raise UserError(f"{folder / 'eval.json'} is damaged", "run fpo eval again")
    return result


def _is_evaluation(result: Any) -> bool:
    """Whether a value is the content of eval.json, as far as pages and cards depend on it."""
    try:
        evaluation_table([result])
        known = result["reward_accuracy"]["share"], result["pairs"]
        return all(map(is_finite_number, known)) and all(
            isinstance(text, str)
            for text in (result["store"]["fingerprint"], result["model"], result["split"])
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return False


def _describe_store(path: str, fingerprint: str) -> dict[str, Any]:
    """Model, data and SAEs of a run's store, if the store is still there."""
    try:
        store = Store.open(path)
    except UserError:
        return {}
    if store.meta["fingerprint"] != fingerprint:
        return {}
    return {
        "model": store.meta["model"]["source"],
        "data": store.meta["data"]["source"],
        "pairs": store.pairs,
        "sites": {site: about["sae"]["source"] for site, about in store.sites.items()},
    }


def _names(paths: list[str]) -> list[str]:
    """The folders' names, or their paths if two have the same name."""
    names = [Path(path).resolve().name for path in paths]
    return [
        path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]


def _differing(settings: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of each; None without."""
    known = [values for values in settings if values is not None]
    names = dict.fromkeys(name for values in known for name in values)
    return {
        name: [None if values is None else values[name] for values in settings]
        for name in names
        if name not in _NO_DIFFERENCE and any(v[name] != known[0][name] for v in known)
    }


def _curves(lines: list[list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """By metric the curves of all runs and splits: number of the run, split, steps, values."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, rows in enumerate(lines):
        for split in ("train", "eval"):
            own = [row for row in rows if row["split"] == split]
            for name in dict.fromkeys(name for row in own for name in row):
                if name in ("step", "split"):
                    continue
                points = np.array([[row["step"], row[name]] for row in own if name in row], float)
                steps, values = _thinned(points)
                curve = {"run": run, "split": split, "step": steps, "value": values}
                found.setdefault(name, []).append(curve)
    return found


def _thinned(points: np.ndarray) -> tuple[list[float], list[float]]:
    """Points [n, 2] as two lists, at most `_POINTS` of them."""
    if len(points) > _POINTS:
        points = np.array([part.mean(0) for part in np.array_split(points, _POINTS)])
    return points[:, 0].tolist(), points[:, 1].tolist()


def _held_out(
    lines: list[list[dict[str, Any]]], best: list[int | None]
) -> dict[str, list[dict[str, float] | None]]:
    """By metric, for every run, its mean over the held-out pairs at step 0 and at the best step, or
    without --best at the last one measured; None for a run without it."""
    before_after = []
    for rows, chosen in zip(lines, best, strict=True):
        own = [row for row in rows if row["split"] == "eval"]
        begins = bool(own) and own[0]["step"] == 0 and len(own) > 1
        after = next((row for row in own if row["step"] == chosen), own[-1] if own else {})
        before_after.append((own[0], after) if begins else ({}, {}))
    names = dict.fromkeys(name for _, after in before_after for name in after)
    return {
        name: [
            {"before": before[name], "after": after[name]}
            if name in before and name in after
            else None
            for before, after in before_after
        ]
        for name in names
        if name not in ("step", "split")
    }


def _reward_margins(folders: list[Path | None]) -> dict[str, Any] | None:
    """Histograms of the reward margins per token over pairs, between the same edges for all runs;
    None if no run has measurements of its pairs."""
    margins: dict[int, np.ndarray] = {}
    for run, folder in enumerate(folders):
        if folder is not None and (file := folder / "pairs.jsonl").is_file():
            try:
                margins[run] = per_pair(read_measurements(file))["reward_margin_per_token"]
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{file} is damaged: {error}", "run fpo eval again") from error
    if not margins:
        return None
    edges = np.histogram_bin_edges(np.concatenate(list(margins.values())), _BINS)
    return {
        "edges": edges.tolist(),
        "counts": [
            np.histogram(margins[run], edges)[0].tolist() if run in margins else None
            for run in range(len(folders))
        ],
    }
