"""judge/judge.sh: the commands that have the runs' answers judged, for the user to run.

fpo calls no judge itself. The baseline is compared with every other run on the same questions, by
giving the other's answers as the reference: not with the judge's own default opponent.
"""

import json
import os
import re
import shlex
from pathlib import Path

from fpocli.comparison.grid import Grid, Run
from fpocli.config import JUDGES
from fpocli.system.files import replace_text

# The paper's judge is GPT-4 Turbo.
_JUDGE = "gpt-4-1106-preview"
# Clones of the judges' repositories, in the folder where the script is run.
_FASTCHAT = Path("FastChat/fastchat/llm_judge/data")
_ARENA = Path("arena-hard-auto")
# The model that Arena-Hard compares with for these questions.
_ARENA_BASELINE = "gpt-4-0314"
_HEAD = """#!/bin/sh
# Made by fpo compare. Run it with a key of the judge's service; it costs money. Then run fpo
# compare again: it reads what was written to {folder} and fills in the win rates.
# AlpacaEval: pip install alpaca-eval. MT-Bench: pip install "fschat[model_worker,llm_judge]" and
# git clone https://github.com/lm-sys/FastChat. Arena-Hard: git clone
# https://github.com/lmarena/arena-hard-auto, and enter the judge in its config/api_config.yaml.
# Both clones belong into the folder where fpo compare was run, which all paths here start from.
set -e
cd "$(dirname "$0")"/{back}
"""


def write_judge_script(grid: Grid) -> Path | None:
    """Write the script; None if no answers to a judge's questions were sampled, or the grid has no
    baseline."""
    parts = [line for judge in JUDGES for line in _commands(grid, judge)]
    if not parts:
        return None
    folder = judged_folder(grid)
    folder.mkdir(exist_ok=True)
    script = folder / "judge.sh"
    back = os.path.relpath(Path.cwd(), folder)
    replace_text(
        script, _HEAD.format(folder=folder, back=shlex.quote(back)) + "\n".join(parts) + "\n"
    )
    return script


def judged_folder(grid: Grid) -> Path:
    """Where the judges write."""
    return grid.out / "judge"


def answer_files(run: Run, judge: str) -> dict[float | None, Path]:
    """The files of a run's answers to a judge's questions, by the temperature of the sampling; None
    stands for the temperatures of the questions' categories."""
    files = (run.folder / "eval" / judge / "model_answer").glob("*")
    found = {file: re.search(r"-t(\d[\d.e-]*)$", file.stem) for file in sorted(files)}
    return {float(named[1]) if named else None: file for file, named in found.items()}


def _commands(grid: Grid, judge: str) -> list[str]:
    """For every baseline run, the comparison with each other run of the same seed, at each
    temperature."""
    lines = []
    for other in grid.runs:
        theirs = answer_files(other, judge)
        for own in grid.baselines_of(other):
            for temperature, one in answer_files(own, judge).items():
                if two := theirs.get(temperature):
                    folder = judged_folder(grid) / f"{judge}/{one.stem}_vs_{two.stem}"
                    lines += _COMMANDS[judge](one, two, folder)
    return lines


def _alpaca_eval(one: Path, other: Path, folder: Path) -> list[str]:
    words = [
        "alpaca_eval", "--model_outputs", one, "--reference_outputs", other,
        "--annotators_config", "weighted_alpaca_eval_gpt4_turbo", "--output_path", folder,
    ]  # fmt: skip
    return [_line(words)]


def _mt_bench(one: Path, other: Path, folder: Path) -> list[str]:
    """FastChat reads and writes in data/mt_bench of the current folder."""
    place = folder / "data/mt_bench/model_answer"
    pair = [one.stem, other.stem]
    module = ["python", "-m", "fastchat.llm_judge.gen_judgment", "--judge-model", _JUDGE]
    modes = (["--mode", "single"], ["--mode", "pairwise-baseline", "--baseline-model", other.stem])
    judged = [_line([*module, *mode, "--model-list", *pair]) for mode in modes]
    return [
        _line(["mkdir", "-p", place]),
        _line(["cp", one, other, place]),
        _line(["cp", "-r", _FASTCHAT / "mt_bench/question.jsonl", place.parent]),
        _line(["cp", "-r", _FASTCHAT / "mt_bench/reference_answer", place.parent]),
        _line(["cp", _FASTCHAT / "judge_prompts.jsonl", place.parents[1]]),
        # It asks for a confirmation.
        *(f"(cd {shlex.quote(str(folder))}; yes '' | {command})" for command in judged),
    ]


def _arena_hard(one: Path, other: Path, folder: Path) -> list[str]:
    """Its baseline is fixed by the questions' category, so the opponent's answers take the file
    name of that baseline; the verdicts name the opponent itself."""
    data = folder / "data/arena-hard-v0.1"
    settings = {"model_list": [one.stem], "regex_patterns": [r"\[\[([AB<>=]+)\]\]"]}
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    return [
        _line(["mkdir", "-p", data / "model_answer"]),
        _line(["cp", one, data / "model_answer"]),
        _line(["cp", other, data / f"model_answer/{_ARENA_BASELINE}.jsonl"]),
        _line(["cp", _ARENA / "data/arena-hard-v0.1/question.jsonl", data]),
        _line(["cp", _ARENA / "config/arena-hard-v0.1.yaml", folder / "judge.yaml"]),
        f"printf '%s\\n' '' {shlex.join(lines)} >> {shlex.quote(str(folder / 'judge.yaml'))}",
        f"(top=$PWD; cd {shlex.quote(str(folder))}; PYTHONPATH=$top/{_ARENA} python "
        f"$top/{_ARENA}/gen_judgment.py --setting-file judge.yaml "
        f"--endpoint-file $top/{_ARENA}/config/api_config.yaml)",
    ]


_COMMANDS = {"alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench, "arena_hard": _arena_hard}


def _line(words: list) -> str:
    return shlex.join(map(str, words))
