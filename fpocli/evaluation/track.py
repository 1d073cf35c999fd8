"""What an evaluation sends to its run's trackers: numbers, charts, changed features, samples."""

from pathlib import Path
from typing import Any

import numpy as np

from fpocli.evaluation.feature_changes import FeatureChanges
from fpocli.evaluation.samples import Samples
from fpocli.tracking.tracker import Rows
from fpocli.tracking.trackers import Trackers

# Rows of a table: features at each site, and answers to each set of prompts.
_FEATURES, _ANSWERS = 50, 100


def send_evaluation(
    trackers: Trackers,
    result: dict[str, Any],
    changes: dict[str, FeatureChanges],
    answers: list[Samples],
    out: Path,
) -> None:
    """Send everything under names that begin with evaluation/.

    Args:
        trackers: with their runs open.
        result: the content of eval.json.
        changes: how features changed, by site.
        answers: the samples, by set of prompts.
        out: the folder with the charts.
    """
    tables = {f"features.{site}": _most_changed(found) for site, found in changes.items()}
    tables |= {f"samples.{samples.asked.name}": _answers(samples) for samples in answers}
    images = {file.stem: file for file in sorted(out.glob("*.png"))}
    trackers.results(
        {f"evaluation/{name}": value for name, value in _numbers(result).items()},
        {f"evaluation/{name}": file for name, file in images.items()},
        {f"evaluation/{name}": rows for name, rows in tables.items() if rows},
    )


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of eval.json, by the names that lead to them."""
    found: dict[str, float] = {}
    for name, value in result.items():
        if name == "generation":
            value = {f"{one['prompts']}-t{one['temperature']}": one for one in value}
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, (int, float)):
            found[name] = float(value)
    return found


def _most_changed(found: FeatureChanges) -> Rows:
    """The features whose mean over all responses changed most, as `fpo features diff` has it."""
    chosen, rejected, before = found.means()
    mean = (chosen + rejected) / 2
    order = np.argsort(-np.abs(mean), kind="stable")[:_FEATURES]
    return [
        {
            "feature": int(feature),
            "before": float(before[feature]),
            "change": float(mean[feature]),
            "chosen": float(chosen[feature]),
            "rejected": float(rejected[feature]),
        }
        for feature in order
        if mean[feature]
    ]


def _answers(samples: Samples) -> Rows:
    """Prompts and answers, the turns one after the other."""
    rows = [
        {
            "prompt": "\n\n".join(samples.asked.prompts[number].turns),
            "temperature": str(temperature),
            "answer": "\n\n".join(turn["text"] for turn in answer["turns"]),
        }
        for temperature, answered in samples.done.items()
        for number, answer in sorted(answered.items())
    ]
    return rows[:_ANSWERS]
