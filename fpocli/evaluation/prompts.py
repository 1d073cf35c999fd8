"""Questions to sample answers to: of AlpacaEval, Arena-Hard and MT-Bench by name, or of a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpocli.config import JUDGES, EvalConfig
from fpocli.system.errors import UserError
from fpocli.system.hub import hub_errors

# Of the questions of MT-Bench (fastchat/llm_judge/common.py); 0.7 for other categories.
_MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_TEMPERATURE = 0.7
# Most tokens of an answer to a judge's question, and to any other.
_JUDGED_TOKENS, _TOKENS = 2048, 512


@dataclass(frozen=True)
class Prompt:
    """A question.

    Args:
        turns: messages of the user; two in MT-Bench.
        row: the record as it is in the file.
    """

    turns: tuple[str, ...]
    row: dict[str, Any]

    def temperature(self, chosen: float | None) -> float:
        """Of the sampling: the one that is set, or else that of the question's category."""
        if chosen is not None:
            return chosen
        return _MT_BENCH_TEMPERATURES.get(self.row.get("category", ""), _TEMPERATURE)


@dataclass(frozen=True)
class PromptSet:
    """The questions of one file, and how they are answered.

    Args:
        name: of the file's judge, or of the file without its ending.
        prompts: the questions, in order.
        temperatures: each question is answered at each; None stands for that of its category.
        max_new_tokens: the most tokens of an answer.
    """

    name: str
    prompts: list[Prompt]
    temperatures: tuple[float | None, ...]
    max_new_tokens: int


def load_prompts(config: EvalConfig) -> list[PromptSet]:
    """The question files of `--generate`, downloaded from the hub where they are named.

    Raises:
        UserError: a file cannot be read or downloaded, or a record holds no question.
    """
    sets = []
    for source in config.generate:
        by_category = source == "mt_bench"
        default = (None,) if by_category else (_TEMPERATURE,)
        sets.append(
            PromptSet(
                name=source if source in JUDGES else Path(source).stem,
                prompts=read_prompts(find_prompts(source))[: config.prompts],
                temperatures=tuple(config.temperature) or default,
                max_new_tokens=config.max_new_tokens
                or (_JUDGED_TOKENS if source in JUDGES else _TOKENS),
            )
        )
    names = [one.name for one in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"two of the prompt files are called {twice.pop()}",
            "rename one; the answers are written to a folder of the file's name",
        )
    return sets


def find_prompts(source: str, *, download: bool = True) -> Path:
    """The file of a judge's questions in the hub's cache, or a local file.

    Args:
        source: a name of `JUDGES`, or a path.
        download: whether to ask the hub for a file that is not in its cache.
    """
    if source not in JUDGES:
        return Path(source)
    from huggingface_hub import hf_hub_download

    repository, kind, file = JUDGES[source]
    with hub_errors(f"the question file of {source} ({file} of {repository})"):
        return Path(
            hf_hub_download(repository, file, repo_type=kind, local_files_only=not download)
        )


def read_prompts(file: Path) -> list[Prompt]:
    """The questions of a JSON list or JSONL file, in order.

    A record holds `instruction` (AlpacaEval), `prompt` (Arena-Hard 2, or plain) or `turns`
    (MT-Bench: texts; Arena-Hard 0.1: records with `content`).

    Raises:
        UserError: the file cannot be read, or a record holds no question.
    """
    if not file.is_file():
        raise UserError(
            f"the prompts {file} do not exist",
            f"name a JSON or JSONL file, or one of {', '.join(JUDGES)}",
        )
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    # Brackets nested too deeply raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is neither JSON nor JSONL: {error}", "correct the file") from error
    prompts = [Prompt(_turns(row, file, number), row) for number, row in enumerate(rows, 1)]
    if not prompts:
        raise UserError(f"{file} has no prompts", "name a file with at least one record")
    return prompts


def _turns(row: Any, file: Path, number: int) -> tuple[str, ...]:
    content: Any = None
    if isinstance(row, dict):
        content = row.get("turns") or row.get("instruction") or row.get("prompt")
    texts = content if isinstance(content, list) else [content]
    if len(texts) > 1 and "question_id" not in row:
        raise UserError(
            f"record {number} of {file} has several turns and no question_id",
            "only MT-Bench's judge reads several turns, and it needs the id",
        )
    texts = [text.get("content") if isinstance(text, dict) else text for text in texts]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"record {number} of {file} has no question",
            'write {"prompt": "..."}, or use a file of AlpacaEval, Arena-Hard or MT-Bench',
        )
    return tuple(texts)
