"""Answer files in the layouts that the judges' own tools read.

AlpacaEval (alpaca_eval --model_outputs FILE), Arena-Hard (data/.../model_answer/NAME.jsonl) and
MT-Bench (FastChat's data/mt_bench/model_answer/NAME.jsonl).
"""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from fpocli.files import replace_text
from fpocli.prompts import Prompt


def write_answers(
    prompts: list[Prompt], rows: list[dict[str, Any]], name: str, out: Path
) -> list[Path]:
    """Write the files that the prompts are meant for.

    Args:
        prompts: the questions.
        rows: per prompt `turns`, each with a `text`.
        name: of the model in the files.
        out: a folder in it for each judge.

    Returns:
        the files: MT-Bench's for questions with a `question_id`, Arena-Hard's for those with a
        `uid` or, as in its version 0.1, turns that are records; AlpacaEval's for any others.
    """
    texts = [[turn["text"] for turn in row["turns"]] for row in rows]
    pairs = list(zip(prompts, texts, strict=True))
    if all("question_id" in prompt.row for prompt in prompts):
        first = all(isinstance(turn, dict) for p in prompts for turn in p.row.get("turns", [""]))
        folder, make = ("arena_hard", _arena_hard_01) if first else ("mt_bench", _mt_bench)
        return [_lines(out / folder / f"{name}.jsonl", [make(*pair, name) for pair in pairs])]
    if all("uid" in prompt.row for prompt in prompts):
        return [
            _lines(out / "arena_hard" / f"{name}.jsonl", [_arena_hard(*p, name) for p in pairs])
        ]
    file = out / "alpaca_eval" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    answers = [
        {
            "dataset": prompt.row.get("dataset", ""),
            "instruction": prompt.turns[0],
            "output": answer[0],
            "generator": name,
        }
        for prompt, answer in pairs
    ]
    replace_text(file, json.dumps(answers, indent=1, ensure_ascii=False))
    return [file]


def _mt_bench(prompt: Prompt, texts: list[str], name: str) -> dict[str, Any]:
    return {
        "question_id": prompt.row["question_id"],
        "answer_id": uuid.uuid4().hex,
        "model_id": name,
        "choices": [{"index": 0, "turns": texts}],
        "tstamp": time.time(),
    }


def _arena_hard_01(prompt: Prompt, texts: list[str], name: str) -> dict[str, Any]:
    answer = _mt_bench(prompt, texts, name)
    answer["choices"] = [{"index": 0, "turns": [{"content": text} for text in texts]}]
    return answer


def _arena_hard(prompt: Prompt, texts: list[str], name: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for question, answer in zip(prompt.turns, texts, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": {"answer": answer}})
    return {
        "uid": prompt.row["uid"],
        "ans_id": uuid.uuid4().hex,
        "model": name,
        "messages": messages,
        "tstamp": time.time(),
        # Arena-Hard's add_markdown_info.py fills it in, for style control.
        "metadata": {},
    }


def _lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_text(file, "".join(lines))
    return file
