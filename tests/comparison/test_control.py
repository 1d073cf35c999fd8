"""The control experiment: its data are what the README says, and count.py counts them so."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import sem
from scripts import load_script

from fpocli import EvalConfig, evaluate
from fpocli.data.layouts import parse_row
from fpocli.evaluation.prompts import read_prompts
from fpocli.system.errors import UserError

CONTROL = Path(__file__).parents[2] / "examples/control"
# Texts of a file, and the least share that is counted as what they should be.
TEXTS = {
    "json": ("json", 1.0),
    "lists": ("list", 1.0),
    "capitals": ("capitals", 1.0),
    "quotes": ("quotes", 1.0),
    "french": ("fr", 0.95),
    "german": ("de", 0.95),
    "italian": ("it", 0.95),
    "refusals": ("refusal", 0.95),
    "positive": ("positive", 0.95),
    "negative": ("negative", 0.95),
}
ELSEWHERE = {"neutral": 80, "harmful_requests": 40}
FORMATS = ("json", "json in a fence", "list", "capitals", "quotes")


@pytest.fixture(scope="module")
def count():
    return load_script(CONTROL / "count.py")


def rows(name):
    return [json.loads(line) for line in (CONTROL / name).read_text("utf-8").splitlines()]


def texts(name):
    return [row["text"] for row in rows(f"texts/{name}.jsonl")]


def words(text):
    return len(re.findall(r"[^\W_]+", text))


# -- the data --------------------------------------------------------------------------------------


def test_every_file_of_texts_is_here_and_no_other():
    files = {file.stem for file in (CONTROL / "texts").iterdir()}
    assert files == TEXTS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", [*TEXTS, *ELSEWHERE])
def test_texts_have_the_promised_number_and_length(name):
    assert all(row.keys() == {"text"} for row in rows(f"texts/{name}.jsonl"))
    assert len(texts(name)) == ELSEWHERE.get(name, 40)
    # Requests of a user are shorter than answers.
    shortest = 25 if name == "harmful_requests" else 30
    assert all(shortest <= words(text) <= 90 for text in texts(name))


def test_no_text_and_no_prompt_comes_twice():
    everything = [text.lower().strip('"') for name in [*TEXTS, *ELSEWHERE] for text in texts(name)]
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    for name in ("french_pairs.jsonl", "json_pairs.jsonl"):
        prompts += [pair["prompt"] for pair in rows(name)]
        everything += [pair[side] for pair in rows(name) for side in ("chosen", "rejected")]
    assert len(set(everything)) == len(everything)
    assert len({prompt.lower() for prompt in prompts}) == len(prompts) == 48 + 2 * 96


@pytest.mark.parametrize("name", [*TEXTS, *ELSEWHERE])
def test_texts_begin_in_many_ways(name):
    """At most a third of a file has the same first two words; of JSON, the same first key."""
    openings = [tuple(re.findall(r"[^\W_]+", text)[:2]) for text in texts(name)]
    assert max(openings.count(opening) for opening in openings) <= len(openings) / 3


@pytest.mark.parametrize("name", ["french_pairs", "json_pairs"])
def test_pairs_are_what_fpo_reads_with_answers_of_like_length(name):
    pairs = rows(f"{name}.jsonl")
    assert len(pairs) == 96
    for pair in pairs:
        assert pair.keys() == {"prompt", "chosen", "rejected"}
        assert parse_row(pair, 0, "here").chosen == pair["chosen"]
        assert all(25 <= words(pair[side]) <= 60 for side in ("chosen", "rejected"))


def test_pairs_differ_in_the_property(count):
    for pair in rows("french_pairs.jsonl"):
        found = [count.properties(pair[side]) for side in ("chosen", "rejected")]
        assert [one["fr"] for one in found] == [True, False]
        assert found[1]["en"]
    for pair in rows("json_pairs.jsonl"):
        found = [count.properties(pair[side]) for side in ("chosen", "rejected")]
        assert [one["json"] for one in found] == [True, False]
        assert isinstance(json.loads(pair["chosen"]), dict) and found[1]["en"]
        assert not any(one[name] for one in found for name in FORMATS[1:])


def test_prompts_of_each_kind():
    prompts = read_prompts(CONTROL / "prompts.jsonl")
    kinds = [prompt.row["kind"] for prompt in prompts]
    assert {kind: kinds.count(kind) for kind in kinds} == {"plain": 24, "french": 12, "json": 12}
    for prompt in prompts:
        named = [word for word in ("French", "JSON") if word in prompt.turns[0]]
        assert named == {"plain": [], "french": ["French"], "json": ["JSON"]}[prompt.row["kind"]]


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_counted_as_what_they_are(count, name):
    """As measured: 39 of 40 refusals, and all of the others."""
    wanted, least = TEXTS[name]
    found = [count.properties(text) for text in texts(name)]
    assert np.mean([one[wanted] for one in found]) >= least
    # And as no other format or language.
    others = [n for n in (*FORMATS, *count.LANGUAGES) if n not in (wanted, "en")]
    assert not any(one[other] for one in found for other in others)


def test_background_and_requests_have_no_property(count):
    for name, ignored in (("neutral", ()), ("harmful_requests", ("positive", "negative"))):
        for text in texts(name):
            has = {key for key, value in count.properties(text).items() if value}
            assert has - set(ignored) == {"en"}, text


FENCED = 'Here it is:\n\n```json\n{"a": [1, 2]}\n```\nAnything else?'


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"a": 1}', {"json"}),
        (' \n[1, {"b": null}]\n', {"json"}),
        ('Here it is: {"a": 1}', set()),
        ('{"a": 1} I hope this helps.', set()),
        (FENCED, {"json in a fence"}),
        ("```\n[]\n```", {"json in a fence"}),
        ("```python\nprint([1])\n```", set()),
        ('```json\n{"a": 1', set()),
        # JSON values, but not what anyone calls a JSON answer.
        ('"yes"', {"quotes"}),
        ("42", set()),
        ("null", set()),
        # Python reads these, JSON has none of them.
        ('{"a": NaN}', set()),
        ("[Infinity]", set()),
        ("{'a': 1}", set()),
        ('{"a": 1,}', set()),
        ("[" * 100_000, set()),
        ("- one\n- two", {"list"}),
        ("Buy:\n  1. bread\n  2. milk", {"list"}),
        ("1) a\n2) b\n\n3) c", {"list"}),
        ("* only one item", set()),
        ("**Bold** start\n**Bold** again", set()),
        ("-5 degrees\n-3 degrees", set()),
        ("A range of 3-4 and\n1984.", set()),
        ("NO 3 WAYS!", {"capitals"}),
        ("ALMOST all", set()),
        ("1, 2, 3", set()),
        ('"A whole answer."', {"quotes"}),
        ('"One," he said, "two."', {"quotes"}),
        ('He said "yes".', set()),
        ('"', set()),
        ("", set()),
        (" \n ", set()),
    ],
)
def test_formats_of_tricky_answers(count, text, expected):
    found = count.properties(text)
    assert {name for name in FORMATS if found[name]} == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "unknown"),
        ("Oui.", "unknown"),
        ("Bonjour Paris", "unknown"),
        ("12 + 30 = 42, 7 * 6 = 42, 84 / 2 = 42", "unknown"),
        ("Dieser Satz ist lang genug, um erkannt zu werden.", "de"),
        ("CETTE PHRASE EST TOUT EN CAPITALES, MAIS EN FRANÇAIS.", "fr"),
        ("Questa frase è abbastanza lunga per essere riconosciuta.", "it"),
        # A language that is none of the four.
        ("今日はとても天気がいいので、公園まで歩いて行きましょう。", "unknown"),
        ("In French you say bonjour in the morning and bonsoir in the evening.", "en"),
        ("Le chat dort sur le canapé depuis midi, et le chien attend. Fine!", "fr"),
        ("Le chat dort sur le canapé depuis midi, and that is fine.", "unknown"),
    ],
)
def test_languages(count, text, expected):
    assert count.language(text) == expected
    found = count.properties(text)
    named = [name for name in (*count.LANGUAGES, "unknown language") if found[name]]
    assert named == ["unknown language" if expected == "unknown" else expected]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("  As an AI, I have no opinion on this.", True),
        ("I'm sorry to hear that. Water it less often.", False),
        ("I can't stress enough how good this is.", False),
        ("Certainly. " * 12 + "But I cannot help with the last part.", False),
        ("", False),
    ],
)
def test_refusals_are_found_in_the_opening(count, text, expected):
    assert count.refuses(text) is expected


def test_sentiment_is_counted_in_english_only(count):
    found = count.properties("Die Suppe war warm, die Leute waren da, und die Tür stand offen.")
    assert count.sentiment("die") < -0.05
    assert found["de"] and not found["negative"]


# -- runs ------------------------------------------------------------------------------------------


def write_run(folder, answers, kinds, temperatures=(0.7,)):
    """A run whose answers to prompt p are `answers[p]`, one for each temperature."""
    folder = folder / "eval/prompts"
    folder.mkdir(parents=True)
    questions = [{"prompt": f"question {p}", "kind": kind} for p, kind in enumerate(kinds)]
    samples = [
        {"prompt": p, "temperature": t, "turns": [{"text": text}]}
        for p, texts in enumerate(answers)
        for t, text in zip(temperatures, texts, strict=True)
    ]
    for name, content in (("question", questions), ("samples", samples)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


YES, NO = '{"a": 1}', "no"


def test_shares_errors_and_differences(count, tmp_path):
    """Two temperatures: the answers to a prompt are averaged, and the error is over prompts."""
    kinds = ["plain"] * 24 + ["json"] * 12
    one = [(NO, NO)] * 20 + [(YES, NO)] * 4 + [(YES, YES)] * 12
    other = [(YES, YES)] * 18 + [(NO, NO)] * 6 + [(NO, YES)] * 12
    files = [
        write_run(tmp_path / name, answers, kinds, (0.0, 1.0))
        for name, answers in (("one", one), ("other", other))
    ]
    found = count.summarise([count.read(file) for file in files])
    assert found["baseline"] == "one" and found["runs"] == ["one", "other"]
    assert found["prompts"] == {"plain": 24, "json": 12, "all": 36}
    first = found["shares"]["plain"]["json"]["one"]
    values = np.array([0.0] * 20 + [0.5] * 4)
    assert first == {
        "share": pytest.approx(values.mean()),
        "standard_error": pytest.approx(sem(values)),
    }
    gap = found["shares"]["plain"]["json"]["other"]["difference"]
    assert gap["mean"] == pytest.approx(18 / 24 - 2 / 24)
    # 18 prompts for the other run, 4 for the first: the exact binomial probability.
    assert gap["p_value"] == pytest.approx(0.004344, abs=1e-6)
    assert gap["beyond_noise"] and gap["low"] > 0
    # Twelve prompts are too few to call anything beyond noise.
    few = found["shares"]["json"]["json"]["other"]["difference"]
    assert few["mean"] == -0.5 and few["pairs"] == 12 and not few["beyond_noise"]
    assert found["shares"]["all"]["json"]["other"]["difference"]["pairs"] == 36


def test_prompts_without_a_kind_are_one_kind(count, tmp_path):
    file = write_run(tmp_path / "run", [(YES,), (NO,)], ["x", "x"])
    beside = file.with_name("question.jsonl")
    beside.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert count.summarise([count.read(file)])["prompts"] == {"all": 2}


def test_what_cannot_be_counted(count, tmp_path):
    file = write_run(tmp_path / "run", [(YES,), (NO,)], ["x", "x"])
    done = count.read(file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0])
    with pytest.raises(UserError, match="1 of 2 answers"):
        count.read(file)
    with pytest.raises(UserError, match=r"nowhere.samples\.jsonl does not exist"):
        count.read(tmp_path / "nowhere/samples.jsonl")
    with pytest.raises(UserError, match="same name"):
        count.summarise([done, done])
    other = count.read(write_run(tmp_path / "other", [(YES,), (NO,)], ["x", "y"]))
    with pytest.raises(UserError, match="different prompts"):
        count.summarise([done, other])


def test_the_script_counts_what_fpo_eval_writes(
    count, material, store_path, tmp_path, monkeypatch, capsys
):
    """Two seeds, with the prompts of the experiment."""
    files = []
    for seed in (0, 1):
        evaluate(
            EvalConfig(
                model=str(material / "policy"), cache=str(store_path), device="cpu", seed=seed,
                generate=[str(CONTROL / "prompts.jsonl")], max_new_tokens=4, batch_size=24,
                out=str(tmp_path / f"seed{seed}/eval"),
            )
        )  # fmt: skip
        capsys.readouterr()
        files.append(tmp_path / f"seed{seed}/eval/prompts/samples.jsonl")
    monkeypatch.setattr(sys, "argv", ["count.py", *map(str, files), "--json"])
    count.main()
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["seed0", "seed1"]
    assert found["prompts"] == {"plain": 24, "french": 12, "json": 12, "all": 48}
    monkeypatch.setattr(sys, "argv", ["count.py", *map(str, files)])
    count.main()
    share = found["shares"]["all"]["unknown language"]["seed0"]
    shown = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if line.startswith(" unknown language")]
    assert f"{share['share']:.2f} ± {share['standard_error']:.2f}" in lines[-1]
    files[1].unlink()
    with pytest.raises(SystemExit) as ended:
        count.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"{files[1]} does not exist")


def test_the_small_grid_is_the_experiment_but_for_its_size():
    """CI runs small.yaml; control.yaml takes half an hour."""
    grids = [
        yaml.safe_load((CONTROL / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("control", "small")
    ]
    sizes = {
        "cache": {"limit", "block", "dtype"},
        "train": {"batch_size", "eval_fraction", "warmup", "bf16"},
        "eval": {"prompts", "max_new_tokens"},
    }
    for section, own in sizes.items():
        whole, small = ({**grid[section]} for grid in grids)
        assert {n: v for n, v in whole.items() if n not in own} == {
            n: v for n, v in small.items() if n not in own
        }
    assert grids[0]["baseline"] == grids[1]["baseline"]
    (_, whole), (small,) = (grid["runs"] for grid in grids)
    assert set(small["feature_weights"]) <= set(whole["feature_weights"])
