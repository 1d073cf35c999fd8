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

from fpocli.comparison.verdicts import read_verdicts
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
    duel = read_verdicts(alpaca).duel("alpaca_eval", "fpo", "dpo")
    board = pd.read_csv(alpaca / "leaderboard.csv", index_col=0).loc["fpo"]
    assert duel.win_rate == pytest.approx((board["win_rate"], board["standard_error"]))
    assert duel.win_rate[0] == 50
    assert duel.length_controlled is None
    assert len(duel.wins) == 5 and duel.wins["q2"] == [0.5]


def test_the_other_models_win_rate_is_the_rest(alpaca):
    found = read_verdicts(alpaca)
    rate, error = found.duel("alpaca_eval", "fpo", "dpo").win_rate
    assert found.duel("alpaca_eval", "dpo", "fpo").win_rate == pytest.approx((100 - rate, error))
    assert found.duel("alpaca_eval", "fpo", "simpo") is None
    assert found.duel("arena_hard", "fpo", "dpo") is None


def test_length_controlled_rates_are_read_where_alpaca_eval_has_them(alpaca, tmp_path):
    """As its default metric writes them, which needs a file of the hub."""
    folder = shutil.copytree(alpaca, tmp_path / "out")
    board = pd.read_csv(folder / "leaderboard.csv", index_col=0)
    board["length_controlled_winrate"], board["lc_standard_error"] = 54.5, 1.5
    board.to_csv(folder / "leaderboard.csv")
    found = read_verdicts(folder)
    assert found.duel("alpaca_eval", "fpo", "dpo").length_controlled == (54.5, 1.5)
    assert found.duel("alpaca_eval", "dpo", "fpo").length_controlled == (45.5, 1.5)


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
    found = read_verdicts(mt_bench)
    printed = (HERE / "fastchat/result-pairwise.txt").read_text()
    for model, other in (("fpo", "dpo"), ("dpo", "fpo")):
        line = next(line for line in printed.splitlines() if line.startswith(model))
        assert found.duel("mt_bench", model, other).win_rate[0] == pytest.approx(
            100 * float(line.split()[-1])
        )
    single = (HERE / "fastchat/result-single.txt").read_text()
    for model in ("fpo", "dpo"):
        mean = float(re.findall(rf"^{model} +([\d.]+)$", single, re.MULTILINE)[0])
        grades = found.grades["mt_bench", model].values()
        assert np.mean(list(grades)) == pytest.approx(mean, abs=1e-5)
    gap, error = found.grade("mt_bench", "fpo", "dpo")
    other = found.grades["mt_bench", "dpo"]
    gaps = {}
    for (question, turn), value in found.grades["mt_bench", "fpo"].items():
        gaps.setdefault(question, []).append(value - other[question, turn])
    means = [np.mean(part) for part in gaps.values()]
    assert gap == pytest.approx(np.mean(means))
    assert error == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)))
    assert found.grade("mt_bench", "fpo", "simpo") is None


def arena(folder, rows):
    place = folder / "fpo-t0.7_vs_dpo-t0.7/data/arena-hard-v0.1/model_judgment/gpt-4"
    place.mkdir(parents=True)
    (place / "fpo-t0.7.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def game(score):
    return {"score": score, "judgment": {"answer": f"[[{score}]]"}, "prompt": []}


@pytest.mark.parametrize("names", [{"baseline": "dpo-t0.7"}, {}])
def test_arena_hards_games_are_weighed_as_its_own_code_weighs_them(tmp_path, names):
    """A is the baseline in the first game and the model in the second; >> counts three times."""
    games = [("B>>A", "A>B"), ("A=B", "A=B"), ("A>B", "B>>A"), ("B>A", None), ("A<B", "A<<B")]
    about = {"model": "fpo-t0.7", "judge": "gpt-4", "category": "c"} | names
    rows = [
        about | {"uid": f"u{i}", "games": [game(one), game(two) if two else None]}
        for i, (one, two) in enumerate(games)
    ]
    arena(tmp_path, rows)
    duel = read_verdicts(tmp_path).duel("arena_hard", "fpo-t0.7", "dpo-t0.7")
    assert duel.wins == {
        "u0": [1, 1, 1, 1], "u1": [0.5, 0.5], "u2": [0, 0, 0, 0], "u4": [1, 0, 0, 0],
    }  # fmt: skip
    rate, error = duel.win_rate
    assert rate == pytest.approx(100 * (4 + 1 + 0 + 1) / 14)
    assert 0 < error < 40


def test_the_error_of_a_win_rate_covers_questions_with_several_games():
    """Against a bootstrap over questions."""
    from fpocli.comparison.verdicts import HeadToHead

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
    ("name", "text", "message"),
    [
        ("annotations.json", "[{", "is damaged"),
        ("model_judgment/gpt-4_pair.jsonl", "{\n", "is damaged"),
        (
            "model_judgment/j/x.jsonl",
            json.dumps({"uid": "u", "model": "m", "games": [game("A?B"), game("A=B")]}),
            "unknown verdict A\\?B",
        ),
    ],
)
def test_damaged_verdicts_are_reported(tmp_path, name, text, message):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_verdicts(tmp_path)


def test_without_verdicts_there_are_none(tmp_path):
    assert not read_verdicts(tmp_path / "nothing").duels
