"""Answer files in the formats that the judges' own tools read.

AlpacaEval (alpaca_eval --model_outputs FILE), Arena-Hard (data/.../model_answer/NAME.jsonl) and
MT-Bench (FastChat's data/mt_bench/model_answer/NAME.jsonl).
"""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from fpocli.evaluation.prompts import Prompt
from fpocli.system.files import replace_text


def write_answers(prompts: list[Prompt], rows: list[dict[str, Any]], name: str, out: Path) -> Path:
    """Write the file of the judge that the prompts belong to.

    Args:
        prompts: the questions.
        rows: per prompt `turns`, each with a `text`.
        name: of the model in the file.
        out: the folder; the file is in its folder model_answer.

    Returns:
        the file: MT-Bench's for questions with a `question_id`, Arena-Hard's for those with a
        `uid` or, as in its version 0.1, turns that are records; AlpacaEval's for any others.
    """
    make = _alpaca_eval
    if all("question_id" in prompt.row for prompt in prompts):
        turns = [turn for prompt in prompts for turn in prompt.row.get("turns", [""])]
        make = _mt_bench
        if all(isinstance(turn, dict) for turn in turns):
            make = _arena_hard_01
    elif all("uid" in prompt.row for prompt in prompts):
        make = _arena_hard
    answers = [
        make(prompt, [turn["text"] for turn in row["turns"]], name)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    if make is _alpaca_eval:
        file, text = f"{name}.json", json.dumps(answers, indent=1, ensure_ascii=False)
    else:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        file, text = f"{name}.jsonl", "".join(lines)
    folder = out / "model_answer"
    folder.mkdir(exist_ok=True)
    replace_text(folder / file, text)
    return folder / file


def _alpaca_eval(prompt: Prompt, texts: list[str], name: str) -> dict[str, Any]:
    return {
        "dataset": prompt.row.get("dataset", ""),
        "instruction": prompt.turns[0],
        "output": texts[0],
        "generator": name,
    }


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
