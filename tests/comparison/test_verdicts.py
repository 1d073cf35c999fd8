"""Judges' files: AlpacaEval's written by its own code here, FastChat's by its own code once
(fastchat/make.py), Arena-Hard's as its code writes them, which is not a package."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from fpocli.comparison.grid import read_grid
from fpocli.comparison.judge_script import matches, write_judge_scripts
from fpocli.comparison.tables import REPORTS
from fpocli.comparison.verdicts import (
    HeadToHead,
    grade_difference,
    read_grades,
    read_verdicts,
)
from fpocli.system.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXTS = {
    "fpo": ["a long answer here", "x", "same", "more than the other", "s"],
    "dpo": ["short", "a longer one", "same", "less", "longer"],
}


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """Two models' answers, judged by AlpacaEval with a function in the place of GPT-4."""
    folder = tmp_path_factory.mktemp("alpaca")
    for name, texts in TEXTS.items():
        rows = [
            {"instruction": f"q{i}", "output": text, "generator": name, "dataset": "d"}
            for i, text in enumerate(texts)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    words = [
        "alpaca_eval", "--model_outputs", folder / "fpo.json",
        "--reference_outputs", folder / "dpo.json",
        "--annotators_config", "w", "--output_path", folder / "out",
    ]  # fmt: skip
    (folder / "judge.sh").write_text(f"set -e\n{shlex.join(map(str, words))}\n")
    subprocess.run(
        [sys.executable, ROOT / "examples/paper/stub_judge.py", folder / "judge.sh"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    return folder / "out"


def test_alpaca_evals_win_rate_and_error_are_its_leaderboards(alpaca):
    duel = read_verdicts("alpaca_eval", alpaca, "fpo", "dpo")
    board = pd.read_csv(alpaca / "leaderboard.csv", index_col=0).loc["fpo"]
    assert duel.win_rate == pytest.approx((board["win_rate"], board["standard_error"]))
    assert duel.win_rate[0] == 50
    assert duel.length_controlled is None
    assert len(duel.wins) == 5 and duel.wins["q2"] == [0.5]


def test_the_other_models_win_rate_is_the_rest(alpaca):
    rate, error = read_verdicts("alpaca_eval", alpaca, "fpo", "dpo").win_rate
    turned = read_verdicts("alpaca_eval", alpaca, "dpo", "fpo")
    assert turned.win_rate == pytest.approx((100 - rate, error))
    assert read_verdicts("alpaca_eval", alpaca, "fpo", "simpo") is None
    assert read_verdicts("arena_hard", alpaca, "fpo", "dpo") is None


def test_length_controlled_rates_are_read_where_alpaca_eval_has_them(alpaca, tmp_path):
    """As its default metric writes them, which needs a file of the hub."""
    folder = shutil.copytree(alpaca, tmp_path / "out")
    board = pd.read_csv(folder / "leaderboard.csv", index_col=0)
    board["length_controlled_winrate"], board["lc_standard_error"] = 54.5, 1.5
    board.to_csv(folder / "leaderboard.csv")
    for names, rate in ((("fpo", "dpo"), 54.5), (("dpo", "fpo"), 45.5)):
        found = read_verdicts("alpaca_eval", folder, *names)
        assert found.length_controlled == pytest.approx((rate, 1.5))


@pytest.fixture
def mt_bench(tmp_path):
    folder = tmp_path / "mt_bench/model_judgment"
    folder.mkdir(parents=True)
    for file in (HERE / "fastchat").glob("*.jsonl"):
        shutil.copy(file, folder)
    return tmp_path


def test_mt_benchs_figures_are_those_that_fastchat_prints(mt_bench):
    """win_rate_adjusted of its show_result.py, and the mean grade of each turn. One of the judge's
    replies had no grade, so that question's turn is left out of the difference."""
    printed = (HERE / "fastchat/result-pairwise.txt").read_text()
    for model, other in (("fpo", "dpo"), ("dpo", "fpo")):
        line = next(line for line in printed.splitlines() if line.startswith(model))
        assert read_verdicts("mt_bench", mt_bench, model, other).win_rate[0] == pytest.approx(
            100 * float(line.split()[-1])
        )
    single = (HERE / "fastchat/result-single.txt").read_text()
    for model in ("fpo", "dpo"):
        mean = float(re.findall(rf"^{model} +([\d.]+)$", single, re.MULTILINE)[0])
        grades = read_grades(mt_bench, model).values()
        assert np.mean(list(grades)) == pytest.approx(mean, abs=1e-5)
    own, other = read_grades(mt_bench, "fpo"), read_grades(mt_bench, "dpo")
    gap, error = grade_difference(own, other)
    gaps = {}
    for (question, turn), value in own.items():
        gaps.setdefault(question, []).append(value - other[question, turn])
    means = [np.mean(part) for part in gaps.values()]
    assert gap == pytest.approx(np.mean(means))
    assert error == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)))
    assert grade_difference(own, read_grades(mt_bench, "simpo")) is None


def arena(folder, rows):
    place = folder / "data/arena-hard-v0.1/model_judgment/gpt-4"
    place.mkdir(parents=True)
    (place / "fpo-t0.7.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def game(score):
    return {"score": score, "judgment": {"answer": f"[[{score}]]"}, "prompt": []}


def test_arena_hards_games_are_weighed_as_its_own_code_weighs_them(tmp_path):
    """A is the baseline in the first game and the model in the second; >> counts three times."""
    games = [("B>>A", "A>B"), ("A=B", "A=B"), ("A>B", "B>>A"), ("B>A", None), ("A<B", "A<<B")]
    games.append(("A<>B", "A=B"))
    about = {"model": "fpo-t0.7", "judge": "gpt-4", "category": "c"}
    rows = [
        about | {"uid": f"u{i}", "games": [game(one), game(two) if two else None]}
        for i, (one, two) in enumerate(games)
    ]
    arena(tmp_path, rows)
    duel = read_verdicts("arena_hard", tmp_path, "fpo-t0.7", "dpo-t0.7")
    assert duel.wins == {
        "u0": [1, 1, 1, 1], "u1": [0.5, 0.5], "u2": [0, 0, 0, 0], "u4": [1, 0, 0, 0],
    }  # fmt: skip
    rate, error = duel.win_rate
    assert rate == pytest.approx(100 * (4 + 1 + 0 + 1) / 14)
    assert 0 < error < 40


def test_the_error_of_a_win_rate_covers_questions_with_several_games():
    """Against a bootstrap over questions."""
    rng = np.random.default_rng(0)
    wins = {
        str(i): list(np.repeat(float(rng.integers(0, 2)), rng.choice([2, 4]))) for i in range(300)
    }
    rate, error = HeadToHead(wins).win_rate
    parts = list(wins.values())
    drawn = []
    for _ in range(2000):
        chosen = [parts[i] for i in rng.integers(300, size=300)]
        drawn.append(100 * sum(map(sum, chosen)) / sum(map(len, chosen)))
    assert rate == pytest.approx(np.mean(drawn), abs=0.3)
    assert error == pytest.approx(np.std(drawn), rel=0.08)


@pytest.mark.parametrize(
    ("judge", "name", "text"),
    [
        ("alpaca_eval", "annotations.json", "[{"),
        ("alpaca_eval", "annotations.json", '{"a": 1}'),
        ("alpaca_eval", "annotations.json", '[{"instruction": "x", "preference": "much"}]'),
        ("alpaca_eval", "annotations.json", "[" * 100_000),
        ("alpaca_eval", "leaderboard.csv", ""),
        ("alpaca_eval", "leaderboard.csv", ",length_controlled_winrate\nfpo,1\nfpo,2\n"),
        ("alpaca_eval", "leaderboard.csv", ",length_controlled_winrate\nfpo,high\n"),
        ("mt_bench", "x_pair.jsonl", "{\n"),
        ("mt_bench", "x_pair.jsonl", "5\n"),
        ("mt_bench", "x_pair.jsonl", '{"model_1": "fpo", "model_2": "dpo", "g1_winner": "tie"}'),
        ("arena_hard", "model_judgment/x.jsonl", "null"),
        ("arena_hard", "model_judgment/x.jsonl", '{"model": "fpo", "games": null}'),
    ],
)
def test_damaged_verdicts_are_reported(tmp_path, judge, name, text):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with pytest.raises(UserError, match="is not what a judge's tool writes"):
        read_verdicts(judge, tmp_path, "fpo", "dpo")


def test_damaged_grades_are_reported(tmp_path):
    (tmp_path / "x_single.jsonl").write_text('{"model": "fpo", "score": 5}')
    with pytest.raises(UserError, match="is not what a judge's tool writes"):
        read_grades(tmp_path, "fpo")


def test_without_verdicts_there_are_none(tmp_path):
    assert read_verdicts("mt_bench", tmp_path / "nothing", "fpo", "dpo") is None
    assert not read_grades(tmp_path / "nothing", "fpo")


# -- the scripts -----------------------------------------------------------------------------------


def answered(folder, name, judge, rows):
    place = folder / f"runs/{name}/eval/{judge}/model_answer"
    place.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = place / (f"{name}.jsonl" if judge == "mt_bench" else f"{name}-t0.7.jsonl")
    file.write_text(text)
    (place.parent / "question.jsonl").write_text('{"question_id": 81}\n')
    return file


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A grid in a folder with a space in its name, whose runs have answered two judges."""
    folder = tmp_path / "my project"
    (folder / "out").mkdir(parents=True)
    monkeypatch.chdir(folder)
    Path("grid.yaml").write_text(
        "out: out\nstore: s.zarr\nbaseline: fpo\nruns:\n  - method: [dpo, simpo, fpo]\n"
    )
    for name in ("method-dpo", "method-simpo", "method-fpo"):
        rows = [{"question_id": 81, "choices": [name], "answer_id": "a", "tstamp": 1.0}]
        answered(Path("out"), name, "mt_bench", rows)
        answered(Path("out"), name, "arena_hard", [{"uid": "u", "messages": [name]}])
    return read_grid("grid.yaml", REPORTS)


def test_scripts_prepare_what_the_judges_tools_read(judged, tmp_path):
    """Run from another folder, with clones and a python that only says where it was started."""
    top = tmp_path / "my project"
    data = top / "FastChat/fastchat/llm_judge/data"
    (data / "mt_bench/reference_answer").mkdir(parents=True)
    (data / "mt_bench/reference_answer/gpt-4.jsonl").write_text("{}")
    (data / "judge_prompts.jsonl").write_text("{}")
    (top / "arena-hard-auto/config").mkdir(parents=True)
    (top / "arena-hard-auto/config/arena-hard-v0.1.yaml").write_text("name: x\n")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(
        '#!/bin/sh\necho "$PWD" "$@" >> ' + shlex.quote(str(tmp_path / "calls")) + "\n"
    )
    python.chmod(0o755)
    scripts = {script.stem: script.resolve() for script in write_judge_scripts(judged)}
    assert scripts.keys() == {"mt_bench", "arena_hard"}
    for script in scripts.values():
        subprocess.run(
            ["sh", script], cwd="/", check=True,
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("--mode single" in call for call in calls) == 3, "each model's answers once"
    assert sum("--mode pairwise-baseline" in call for call in calls) == 2
    assert sum("gen_judgment.py --setting-file judge.yaml" in call for call in calls) == 2
    for run in judged.runs:
        for match in matches(judged, run):
            made = {str(p.relative_to(match.folder)) for p in match.folder.rglob("*.*l")}
            if match.judge == "mt_bench":
                names = (match.baseline.name, match.other.name)
                assert made == {
                    *(f"data/mt_bench/model_answer/{name}" for name in names),
                    "data/mt_bench/reference_answer/gpt-4-1106-preview.jsonl",
                    "data/mt_bench/question.jsonl",
                    "data/judge_prompts.jsonl",
                }
            else:
                answers = match.folder / "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl"
                assert answers.read_text() == match.other.read_text()
                config = yaml.safe_load((match.folder / "judge.yaml").read_text())
                assert config["model_list"] == ["method-fpo-t0.7"]


def test_verdicts_on_other_answers_are_not_taken(judged):
    """A run that was trained and answered again keeps its name."""
    run = next(run for run in judged.runs if run.name == "method-dpo")
    before = {match.judge: match.folder for match in matches(judged, run)}
    rows = [{"question_id": 81, "choices": ["method-dpo"], "answer_id": "b", "tstamp": 2.0}]
    answered(Path("out"), "method-dpo", "mt_bench", rows)
    answered(Path("out"), "method-dpo", "arena_hard", [{"uid": "u", "messages": ["other"]}])
    after = {match.judge: match.folder for match in matches(judged, run)}
    assert after["mt_bench"] == before["mt_bench"], "only its time and id have changed"
    assert after["arena_hard"] != before["arena_hard"]
