"""The answers that runs sampled to the same prompts, side by side."""

import json
from pathlib import Path
from typing import Any

from fpocli.evaluation.prompts import read_prompts
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_json

# Prompts shown of each set.
_SHOWN = 12


def side_by_side(folders: list[Path | None]) -> list[dict[str, Any]]:
    """The samples of evaluations, by set of prompts and temperature.

    Args:
        folders: of fpo eval, by run; None for a run that is not evaluated.

    Returns:
        for each set and temperature `prompts` (its name), `temperature`, `all` (how many were
        answered) and `rows`: the prompt's turns, or None in folders of version 0.1, and by run the
        turns of its answer, or None.

    Raises:
        UserError: a file is damaged.
    """
    # Sets of the same name may hold other prompts; samples.json has a hash of them.
    found: dict[tuple[str, str, Any], dict[str, Any]] = {}
    for run, folder in enumerate(folders):
        for file in sorted(folder.glob("*/samples.jsonl")) if folder else []:
            about = file.with_name("samples.json")
            asked = str(read_json(about)["prompts"]) if about.is_file() else ""
            questions = file.with_name("question.jsonl")
            turns = [list(one.turns) for one in read_prompts(questions)] if _has(questions) else []
            for answer in _read(file):
                key = (file.parent.name, asked, answer["temperature"])
                group = found.setdefault(key, {})
                number = answer["prompt"]
                row = group.setdefault(
                    number, {"prompt": None, "answers": [None] * len(folders), "number": number}
                )
                row["answers"][run] = answer["turns"]
                if number < len(turns):
                    row["prompt"] = turns[number]
    return [
        {
            "prompts": name,
            "temperature": temperature,
            "all": len(rows),
            "rows": [rows[number] for number in sorted(rows)[:_SHOWN]],
        }
        for (name, _, temperature), rows in found.items()
    ]


def _has(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _read(file: Path) -> list[dict[str, Any]]:
    """The answers in a file: number of the prompt, temperature, texts of the turns."""
    answers = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            answers.append(
                {
                    "prompt": int(row["prompt"]),
                    "temperature": _temperature(row["temperature"]),
                    "turns": [str(turn["text"]) for turn in row["turns"]],
                }
            )
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {file} is damaged: {error}",
                "sample again with `fpo eval --generate ... --overwrite`",
            ) from error
    return answers


def _temperature(value: Any) -> float | None:
    """A temperature; None stands for that of each question's category."""
    return None if value is None else float(value)
