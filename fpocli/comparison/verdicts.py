"""What judges decided, read from the files of AlpacaEval, FastChat (MT-Bench) and Arena-Hard.

A verdict is the share of a win, from 0 to 1, of one model's answer to a question against another
model's answer; a tie is one half. A grade is a judge's number for one answer.
"""

import json
from collections.abc import Iterable, Iterator
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
# Of FastChat's two games, with the answers in both orders.
_GAMES = ("g1_winner", "g2_winner")


@dataclass
class HeadToHead:
    """All verdicts of one judge about two models.

    Args:
        wins: by question, of the first model against the second, each with its weight.
        length_controlled: AlpacaEval's win rate and standard error at equal lengths, in percent.
    """

    wins: dict[str, list[float]] = field(default_factory=dict)
    length_controlled: tuple[float, float | None] | None = None

    @property
    def win_rate(self) -> tuple[float, float | None]:
        """In percent, with its standard error over questions."""
        parts = list(self.wins.values())
        total = sum(map(sum, parts))
        count = sum(map(len, parts))
        rate = total / count
        if len(parts) < 2:
            return 100 * rate, None
        # Of a ratio of sums over questions, since a question may have several games.
        residual = np.array([sum(part) - rate * len(part) for part in parts])
        error = np.sqrt((residual**2).sum() * len(parts) / (len(parts) - 1)) / count
        return 100 * rate, 100 * float(error)


@dataclass
class Verdicts:
    """Everything that was found.

    Args:
        duels: by judge, model and opponent.
        grades: by judge and model, the grades by question and turn.
    """

    duels: dict[tuple[str, str, str], HeadToHead] = field(default_factory=dict)
    grades: dict[tuple[str, str], dict[tuple[str, int], float]] = field(default_factory=dict)

    def duel(self, judge: str, model: str, opponent: str) -> HeadToHead | None:
        """The verdicts of a judge about two models, whichever of them was compared with which."""
        if found := self.duels.get((judge, model, opponent)):
            return found
        turned = self.duels.get((judge, opponent, model))
        if turned is None:
            return None
        wins = {question: [1 - win for win in part] for question, part in turned.wins.items()}
        length = turned.length_controlled
        return HeadToHead(wins, length and (100 - length[0], length[1]))

    def grade(self, judge: str, model: str, opponent: str) -> tuple[float, float | None] | None:
        """By how much the model's grades are above the opponent's, on the same questions and
        turns, with the standard error over questions."""
        one, other = (self.grades.get((judge, name), {}) for name in (model, opponent))
        gaps: dict[str, list[float]] = {}
        for question, turn in one.keys() & other.keys():
            gap = one[question, turn] - other[question, turn]
            gaps.setdefault(question, []).append(gap)
        if not gaps:
            return None
        means = [float(np.mean(part)) for part in gaps.values()]
        error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
        return float(np.mean(means)), error


def read_verdicts(folder: Path) -> Verdicts:
    """Read all files of the judges in a folder and the folders in it.

    Args:
        folder: where the judges' tools wrote; it need not exist.

    Raises:
        UserError: a file is damaged.
    """
    found = Verdicts()
    for file in sorted(folder.rglob("*")):
        if file.name == "annotations.json":
            _alpaca_eval(_json(file, file.read_text(encoding="utf-8")), file.parent, found)
        elif file.suffix == ".jsonl" and "model_judgment" in file.parts:
            for row in _lines(file):
                if "games" in row:
                    _arena_hard(row, file, found)
                elif "g1_winner" in row:
                    _mt_bench_pair(row, found)
                elif "score" in row:
                    _mt_bench_single(row, found)
    return found


def _alpaca_eval(rows: list[dict[str, Any]], folder: Path, found: Verdicts) -> None:
    """generator_2 against generator_1, the reference outputs: a preference of 1 is for output_1, 2
    for output_2, and 0 or 1.5 a tie."""
    for row in rows:
        preference = row.get("preference")
        if preference is None:
            continue
        duel = found.duels.setdefault(
            ("alpaca_eval", row["generator_2"], row["generator_1"]), HeadToHead()
        )
        duel.wins[row["instruction"]] = [0.5 if preference == 0 else preference - 1]
    board = folder / "leaderboard.csv"
    if not board.is_file():
        return
    table = pd.read_csv(board, index_col=0)
    for (judge, model, opponent), duel in found.duels.items():
        here = {(row["generator_2"], row["generator_1"]) for row in rows}
        if judge == "alpaca_eval" and (model, opponent) in here and model in table.index:
            rate = table.loc[model].get("length_controlled_winrate")
            error = table.loc[model].get("lc_standard_error")
            if rate is not None and not pd.isna(rate):
                known = None if error is None or pd.isna(error) else float(error)
                duel.length_controlled = float(rate), known


def _mt_bench_pair(row: dict[str, Any], found: Verdicts) -> None:
    """As FastChat's show_result.py counts: a win if both orders agree on it, else a tie."""
    first, second = (row[game] for game in _GAMES)
    if "error" in (first, second):
        return
    win = 0.5 if first == "tie" or first != second else float(first == "model_1")
    duel = found.duels.setdefault(("mt_bench", row["model_1"], row["model_2"]), HeadToHead())
    duel.wins.setdefault(str(row["question_id"]), []).append(win)


def _mt_bench_single(row: dict[str, Any], found: Verdicts) -> None:
    # -1 stands for an answer of the judge without a grade.
    if row["score"] != -1:
        grades = found.grades.setdefault(("mt_bench", row["model"]), {})
        grades[str(row["question_id"]), row["turn"]] = float(row["score"])


def _arena_hard(row: dict[str, Any], file: Path, found: Verdicts) -> None:
    """The baseline is A in the first game and B in the second, as in its show_result.py."""
    labels = [game and game.get("score") for game in row["games"]]
    if len(labels) != 2 or not all(labels):
        return
    if unknown := [label for label in labels if label not in _LABELS]:
        raise UserError(f"{file} has the unknown verdict {unknown[0]}", "judge the answers again")
    wins = [1 - win for win in _LABELS[labels[0]]] + _LABELS[labels[1]]
    # Its first version does not name the opponent; the folder that judge.sh made does.
    named = [part for part in file.parts if "_vs_" in part]
    opponent = row.get("baseline") or (named[-1].partition("_vs_")[2] if named else "baseline")
    duel = found.duels.setdefault(("arena_hard", row["model"], opponent), HeadToHead())
    duel.wins[str(row.get("uid") or row.get("question_id"))] = wins


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    lines: Iterable[str] = file.read_text(encoding="utf-8").split("\n")
    for line in lines:
        if line.strip():
            yield _json(file, line)


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", "judge the answers again") from error
