"""What judges decided, read from the files of AlpacaEval, FastChat (MT-Bench) and Arena-Hard.

A verdict is the share of a win, from 0 to 1, of one model's answer to a question against another
model's answer; a tie is one half. A grade is a judge's number for one answer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpocli.system.errors import UserError

# Arena-Hard counts a decided game three times (show_result.py), as its label says >> or <<.
_DECIDED = 3
_LABELS = {
    "A>>B": [1.0] * _DECIDED, "A>B": [1.0], "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * _DECIDED,
    "B<<A": [1.0] * _DECIDED, "B<A": [1.0], "B=A": [0.5], "B>A": [0.0], "B>>A": [0.0] * _DECIDED,
}  # fmt: skip
# By question and turn.
Grades = dict[tuple[str, int], float]


@dataclass
class HeadToHead:
    """The verdicts of one judge about two models.

    Args:
        wins: by question, of the first model against the second: one or several games.
        length_controlled: AlpacaEval's win rate and standard error at equal lengths, in percent.
    """

    wins: dict[str, list[float]] = field(default_factory=dict)
    length_controlled: tuple[float, float | None] | None = None

    @property
    def win_rate(self) -> tuple[float, float | None]:
        """In percent, with its standard error over questions."""
        parts = list(self.wins.values())
        count = sum(map(len, parts))
        rate = sum(map(sum, parts)) / count
        if len(parts) < 2:
            return 100 * rate, None
        # Of a ratio of sums over questions, since a question may have several games.
        residual = np.array([sum(part) - rate * len(part) for part in parts])
        error = np.sqrt((residual**2).sum() * len(parts) / (len(parts) - 1)) / count
        return 100 * rate, 100 * float(error)


def read_verdicts(judge: str, folder: Path, model: str, opponent: str) -> HeadToHead | None:
    """What a judge said about a model's answers against an opponent's.

    Args:
        judge: alpaca_eval, arena_hard or mt_bench.
        folder: where its tool wrote, itself or in folders below; it need not exist.
        model, opponent: their names in the answer files. If the judge compared the opponent with
            the model, the verdicts are turned round.

    Returns:
        None if there is no verdict.

    Raises:
        UserError: a file is damaged.
    """
    found = HeadToHead()
    for file in sorted(folder.rglob("*")):
        with _damage(file):
            _READERS[judge](file, model, opponent, found)
    return found if found.wins else None


def read_grades(folder: Path, model: str) -> Grades:
    """MT-Bench's grades of a model's answers, by question and turn.

    Raises:
        UserError: a file is damaged.
    """
    found: Grades = {}
    for file in sorted(folder.rglob("*_single.jsonl")):
        with _damage(file):
            for row in _lines(file):
                # -1 stands for an answer of the judge without a grade.
                if row["model"] == model and row["score"] != -1:
                    found[str(row["question_id"]), row["turn"]] = float(row["score"])
    return found


def grade_difference(one: Grades, other: Grades) -> tuple[float, float | None] | None:
    """By how much one model's grades are above another's, on the same questions and turns, with the
    standard error over questions; None if they have none in common."""
    gaps: dict[str, list[float]] = {}
    for question, turn in one.keys() & other.keys():
        gaps.setdefault(question, []).append(one[question, turn] - other[question, turn])
    if not gaps:
        return None
    means = [float(np.mean(part)) for part in gaps.values()]
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return float(np.mean(means)), error


def _alpaca_eval(file: Path, model: str, opponent: str, found: HeadToHead) -> None:
    """generator_2 against generator_1, the reference outputs: a preference of 1 is for output_1, 2
    for output_2, and 0 or 1.5 a tie."""
    if file.name == "annotations.json":
        for row in json.loads(file.read_text(encoding="utf-8")):
            names, preference = (row["generator_2"], row["generator_1"]), row["preference"]
            if preference is None or set(names) != {model, opponent}:
                continue
            win = 0.5 if preference == 0 else float(preference) - 1
            found.wins[row["instruction"]] = [win if names[0] == model else 1 - win]
    elif file.name == "leaderboard.csv":
        table = pd.read_csv(file, index_col=0)
        for name in (model, opponent):
            if name in table.index and "length_controlled_winrate" in table:
                rate = float(table.loc[name, "length_controlled_winrate"])
                error = float(table.loc[name].get("lc_standard_error", np.nan))
                if not np.isnan(rate):
                    rate = rate if name == model else 100 - rate
                    found.length_controlled = rate, None if np.isnan(error) else error


def _mt_bench(file: Path, model: str, opponent: str, found: HeadToHead) -> None:
    """As FastChat's show_result.py counts: a win if both orders agree on it, else a tie."""
    if not file.name.endswith("_pair.jsonl"):
        return
    for row in _lines(file):
        names = row["model_1"], row["model_2"]
        winners = row["g1_winner"], row["g2_winner"]
        if "error" in winners or set(names) != {model, opponent}:
            continue
        win = 0.5
        if winners[0] == winners[1] != "tie":
            win = float(winners[0] == "model_1")
        wins = found.wins.setdefault(str(row["question_id"]), [])
        wins.append(win if names[0] == model else 1 - win)


def _arena_hard(file: Path, model: str, opponent: str, found: HeadToHead) -> None:
    """The baseline is A in the first game and B in the second, as in its show_result.py. Games
    without a clear verdict do not count there either."""
    if file.suffix != ".jsonl" or "model_judgment" not in file.parts:
        return
    for row in _lines(file):
        labels = [game and game.get("score") for game in row["games"]]
        if row["model"] == model and len(labels) == 2 and all(one in _LABELS for one in labels):
            wins = [1 - win for win in _LABELS[labels[0]]] + _LABELS[labels[1]]
            found.wins[str(row["uid"] if "uid" in row else row["question_id"])] = wins


_READERS: dict[str, Callable[[Path, str, str, HeadToHead], None]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not what a judge's tool writes: {type(error).__name__}: {error}",
            "delete it and judge the answers again",
        ) from error
