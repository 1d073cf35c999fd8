"""Prompt files for sampling: questions of AlpacaEval, Arena-Hard and MT-Bench, or plain ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpocli.system.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A question.

    Args:
        turns: messages of the user; two in MT-Bench.
        row: the record as it is in the file.
    """

    turns: tuple[str, ...]
    row: dict[str, Any]


def read_prompts(path: str) -> list[Prompt]:
    """The questions of a JSON list or JSONL file, in order.

    A record holds `instruction` (AlpacaEval), `prompt` (Arena-Hard 2, or plain) or `turns`
    (MT-Bench: texts; Arena-Hard 0.1: records with `content`).

    Raises:
        UserError: the file cannot be read, or a record holds no question.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"the prompts {path} do not exist", "name a JSON or JSONL file")
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    # Brackets nested too deeply raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is neither JSON nor JSONL: {error}", "correct the file") from error
    prompts = [Prompt(_turns(row, path, number), row) for number, row in enumerate(rows, 1)]
    if not prompts:
        raise UserError(f"{path} has no prompts", "name a file with at least one record")
    return prompts


def _turns(row: Any, path: str, number: int) -> tuple[str, ...]:
    content: Any = None
    if isinstance(row, dict):
        content = row.get("turns") or row.get("instruction") or row.get("prompt")
    texts = content if isinstance(content, list) else [content]
    if len(texts) > 1 and "question_id" not in row:
        raise UserError(
            f"record {number} of {path} has several turns and no question_id",
            "only MT-Bench's judge reads several turns, and it needs the id",
        )
    texts = [text.get("content") if isinstance(text, dict) else text for text in texts]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"record {number} of {path} has no question",
            'write {"prompt": "..."}, or use a file of AlpacaEval, Arena-Hard or MT-Bench',
        )
    return tuple(texts)
