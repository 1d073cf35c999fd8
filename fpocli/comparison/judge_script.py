"""OUT/judge/JUDGE.sh: the commands that have the runs' answers judged, for the user to run.

fpo calls no judge itself. The baseline is compared with every other run on the same questions, by
giving the other's answers as the reference: not with the judge's own default opponent. A judge's
results go to a folder named by the answers, so that they are never taken for verdicts on others.
"""

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fpocli.comparison.grid import Grid, Run
from fpocli.config import JUDGES
from fpocli.system.files import replace_text

# The paper's judge is GPT-4 Turbo.
_JUDGE = "gpt-4-1106-preview"
# Clones of the judges' repositories, in the folder where fpo compare was run.
_FASTCHAT = Path("FastChat/fastchat/llm_judge/data")
_ARENA = Path("arena-hard-auto")
# The model that Arena-Hard compares with for these questions.
_ARENA_BASELINE = "gpt-4-0314"
_INSTALL = {
    "alpaca_eval": "pip install alpaca-eval",
    "mt_bench": 'pip install "fschat[model_worker,llm_judge]", and git clone '
    "https://github.com/lm-sys/FastChat",
    "arena_hard": "git clone https://github.com/lmarena/arena-hard-auto, install its requirements, "
    "and enter the judge in its config/api_config.yaml",
}
_HEAD = """#!/bin/sh
# Made by fpo compare. Run it with a key of the judge's service; it costs money. Then run fpo
# compare again: it reads the verdicts and fills in the win rates.
# Needs, in an environment of its own, since the judges want different versions of openai:
# {install}
# Clones belong into the folder where fpo compare was run, from which all paths here start.
set -e
cd "$(dirname "$0")"/{back}
"""
# Of an answer file; they differ each time it is written.
_VOLATILE = ("answer_id", "ans_id", "tstamp")


@dataclass(frozen=True)
class Match:
    """The answers of a baseline's run and of another run of its seed to the same questions.

    Args:
        judge: alpaca_eval, arena_hard or mt_bench.
        temperature: of the sampling; None for those of the questions' categories.
        baseline, other: the two answer files.
        out: the grid's folder of judges.
    """

    judge: str
    temperature: float | None
    baseline: Path
    other: Path
    out: Path

    @cached_property
    def folder(self) -> Path:
        """Where the judge's results about the two belong."""
        return self.out / self.judge / _digest(self.baseline, self.other)

    def grades(self, answers: Path) -> Path:
        """Where MT-Bench's grades of one of the two belong."""
        return self.out / self.judge / _digest(answers)


def matches(grid: Grid, run: Run) -> list[Match]:
    """What is to be judged about a run: the baseline's answers against its own."""
    found = []
    for judge in JUDGES:
        theirs = _answer_files(run, judge)
        for own in grid.baselines_of(run):
            for temperature, answers in _answer_files(own, judge).items():
                if temperature in theirs:
                    other = theirs[temperature]
                    found.append(Match(judge, temperature, answers, other, grid.out / "judge"))
    return found


def write_judge_scripts(grid: Grid) -> list[Path]:
    """Write a script for every judge whose questions were answered; none without a baseline."""
    lines: dict[str, list[str]] = {}
    for match in (match for run in grid.runs for match in matches(grid, run)):
        script_lines = lines.setdefault(match.judge, [])
        # A baseline's grades are asked for once.
        commands = _COMMANDS[match.judge](match)
        script_lines += [line for line in commands if line not in script_lines]
    written = []
    for judge, commands in lines.items():
        script = grid.out / "judge" / f"{judge}.sh"
        script.parent.mkdir(exist_ok=True)
        back = shlex.quote(os.path.relpath(Path.cwd(), script.parent))
        head = _HEAD.format(install=_INSTALL[judge], back=back)
        replace_text(script, head + "\n".join(commands) + "\n")
        written.append(script)
    return written


def _answer_files(run: Run, judge: str) -> dict[float | None, Path]:
    """The files of a run's answers to a judge's questions, by temperature."""
    files = (run.folder / "eval" / judge / "model_answer").glob("*.json*")
    found = {file: re.search(r"-t(\d[\d.e-]*)$", file.stem) for file in sorted(files)}
    return {float(named[1]) if named else None: file for file, named in found.items()}


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if file.suffix == ".json" else map(json.loads, text.splitlines())
        for row in rows:
            kept = {name: value for name, value in row.items() if name not in _VOLATILE}
            digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _alpaca_eval(match: Match) -> list[str]:
    words = [
        "alpaca_eval", "--model_outputs", match.baseline, "--reference_outputs", match.other,
        "--annotators_config", "weighted_alpaca_eval_gpt4_turbo", "--output_path", match.folder,
    ]  # fmt: skip
    return [_line(words)]


def _mt_bench(match: Match) -> list[str]:
    """FastChat reads and writes in data/mt_bench of the current folder."""
    lines = []
    for answers in (match.baseline, match.other):
        mode = ["--mode", "single", "--model-list", answers.stem]
        lines += _fastchat(match.grades(answers), [answers], mode)
    names = match.baseline.stem, match.other.stem
    mode = ["--mode", "pairwise-baseline", "--baseline-model", names[1], "--model-list", *names]
    return lines + _fastchat(match.folder, [match.baseline, match.other], mode)


def _fastchat(folder: Path, answers: list[Path], mode: list[str]) -> list[str]:
    data = folder / "data/mt_bench"
    command = ["python", "-m", "fastchat.llm_judge.gen_judgment", "--judge-model", _JUDGE, *mode]
    # Its reference answers are by GPT-4, and looked up by the judge's name.
    reference = _FASTCHAT / "mt_bench/reference_answer/gpt-4.jsonl"
    prepared = [
        _line(["mkdir", "-p", data / "model_answer", data / "reference_answer"]),
        _line(["cp", *answers, data / "model_answer"]),
        _line(["cp", _questions(answers[0]), data]),
        _line(["cp", reference, data / f"reference_answer/{_JUDGE}.jsonl"]),
        _line(["cp", _FASTCHAT / "judge_prompts.jsonl", data.parent]),
    ]
    # It asks for a confirmation. One line, so that it is left out as a whole if it is repeated.
    run = f"(cd {shlex.quote(str(folder))}; yes '' | {_line(command)})"
    return [" && ".join([*prepared, run])]


def _arena_hard(match: Match) -> list[str]:
    """Its baseline is fixed by the questions' category, so the opponent's answers take the file
    name of that baseline."""
    data = match.folder / "data/arena-hard-v0.1"
    settings = {"model_list": [match.baseline.stem], "regex_patterns": [r"\[\[([AB<>=]+)\]\]"]}
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    config = match.folder / "judge.yaml"
    top = f'"$top"/{_ARENA}'
    return [
        _line(["mkdir", "-p", data / "model_answer"]),
        _line(["cp", match.baseline, data / "model_answer"]),
        _line(["cp", match.other, data / f"model_answer/{_ARENA_BASELINE}.jsonl"]),
        _line(["cp", _questions(match.baseline), data]),
        _line(["cp", _ARENA / "config/arena-hard-v0.1.yaml", config]),
        f"printf '%s\\n' '' {shlex.join(lines)} >> {shlex.quote(str(config))}",
        f"(top=$PWD; cd {shlex.quote(str(match.folder))}; PYTHONPATH={top} python "
        f"{top}/gen_judgment.py --setting-file judge.yaml "
        f"--endpoint-file {top}/config/api_config.yaml)",
    ]


_COMMANDS = {"alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench, "arena_hard": _arena_hard}


def _questions(answers: Path) -> Path:
    """Those that were answered, which fpo eval keeps beside the answers."""
    return answers.parents[1] / "question.jsonl"


def _line(words: list[Any]) -> str:
    return shlex.join(map(str, words))
