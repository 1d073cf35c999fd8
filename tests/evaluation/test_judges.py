"""The judges' questions and answer files: AlpacaEval, Arena-Hard and MT-Bench."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from hub_cache import snapshot
from processes import Command, results, use_hub

from fpocli import EvalConfig, Store, UserError, evaluate
from fpocli.config import JUDGES
from fpocli.evaluation.prompts import Prompt, load_prompts, read_prompts
from fpocli.evaluation.sampling import Sampler
from fpocli.model.network import load_network
from fpocli.scoring.loading import tokenizer_of
from fpocli.system.model_folder import find_model

QUESTIONS = ["say the cat", "code with the hat on the mat and some more", "rat"]


def config(material, out, *sources, **changes) -> EvalConfig:
    settings = {
        "model": str(material / "policy"),
        "cache": str(material / "ref.zarr"),
        "generate": [str(source) for source in sources],
        "max_new_tokens": 10,
        "batch_size": 2,
        "device": "cpu",
        "out": str(out),
    }
    return EvalConfig(**(settings | changes))


ROWS = {
    "alpaca_eval": [
        {"instruction": text, "output": "x", "generator": "text_davinci_003", "dataset": "koala"}
        for text in QUESTIONS
    ],
    "arena_hard": [
        {"uid": f"u{i}", "category": "arena-hard-v0.1", "cluster": "c", "prompt": text}
        for i, text in enumerate(QUESTIONS)
    ],
    "mt_bench": [
        {"question_id": 81 + i, "category": category, "turns": [text, "again"]}
        for i, (text, category) in enumerate(
            zip(QUESTIONS, ("writing", "math", "stem"), strict=True)
        )
    ],
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with the three question files where their repositories have them."""
    hub = tmp_path_factory.mktemp("hub")
    for name, (repository, kind, place) in JUDGES.items():
        file = snapshot(hub, repository, kind) / place
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps(row) for row in ROWS[name]]
        file.write_text(f"[{', '.join(rows)}]" if file.suffix == ".json" else "\n".join(rows))
    return hub


def fpo(words, hub):
    """A command with a hub cache."""
    (done,) = results(Command(*words, prepare=partial(use_hub, hub)))
    return done


def test_the_judges_questions_are_found_by_name(material, store_path, hub, tmp_path):
    """With the real download code, offline, in the layout of the hub's cache."""
    words = ["eval", str(material / "policy"), "--cache", str(store_path), "--device", "cpu"]
    for name in JUDGES:
        words += ["--generate", name]
    words += ["--prompts", "2", "--max-new-tokens", "4", "--out", str(tmp_path), "--json"]
    done = fpo(words, hub)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["generation"]
    assert [(one["prompts"], one["temperature"], one["responses"]) for one in found] == [
        ("alpaca_eval", 0.7, 2), ("arena_hard", 0.7, 2), ("mt_bench", None, 4),
    ]  # fmt: skip
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/model_answer/*")}
    assert names == {
        "alpaca_eval/model_answer/policy-t0.7.json",
        "arena_hard/model_answer/policy-t0.7.jsonl",
        "mt_bench/model_answer/policy.jsonl",
    }


def test_a_question_file_that_is_not_there_is_reported(material, store_path, tmp_path):
    words = ["eval", str(material / "policy"), "--cache", str(store_path), "--generate"]
    done = fpo([*words, "mt_bench"], tmp_path / "empty")
    assert done.returncode == 2
    missing = "the question file of mt_bench (data/mt_bench/question.jsonl of lmsys/mt-bench)"
    assert f"error: {missing} is not on this machine" in done.stderr
    done = fpo([*words, "nothing.json"], tmp_path / "empty")
    assert done.returncode == 2
    assert "JSON or JSONL file, or one of alpaca_eval, arena_hard, mt_bench" in done.stderr


def test_defaults_of_the_judges_and_of_a_file(material, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub))
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "a"}))

    def found(*sources, **changes):
        settings = {"max_new_tokens": None} | changes
        sets = load_prompts(config(material, tmp_path, *sources, **settings))
        return [(one.name, one.temperatures, one.max_new_tokens, len(one.prompts)) for one in sets]

    assert found("mt_bench", "alpaca_eval", file) == [
        ("mt_bench", (None,), 2048, 3), ("alpaca_eval", (0.7,), 2048, 3), ("mine", (0.7,), 512, 1),
    ]  # fmt: skip
    assert found("mt_bench", temperature=[1.0], max_new_tokens=5, prompts=1) == [
        ("mt_bench", (1.0,), 5, 1)
    ]
    other = tmp_path / "folder" / "mine.json"
    other.parent.mkdir()
    other.write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match="two of the prompt files are called mine"):
        found(file, other)


def test_mt_bench_temperatures_are_fastchats(material, store_path, monkeypatch):
    """Of fastchat/llm_judge/common.py: math 0, stem 0.1, writing and unknown ones 0.7."""
    prompts = [Prompt(("say the cat",), {"category": name}) for name in ("writing", "math", "stem")]
    prompts.append(Prompt(("say the cat",), {"category": "arena-hard"}))
    assert [prompt.temperature(None) for prompt in prompts] == [0.7, 0.0, 0.1, 0.7]
    assert [prompt.temperature(0.3) for prompt in prompts] == [0.3] * 4
    store, folder = Store.open(store_path), find_model(str(material / "policy"))
    special = store.meta["tokenizer"]["special_tokens"]
    network = load_network(folder, torch.float32)
    mouth = Sampler(network, tokenizer_of(store, folder), **special, top_p=1.0, seed=0)
    used = []
    real = Sampler._sample

    def note(self, talks, temperature, most):
        used.append((len(talks), temperature))
        return real(self, talks, temperature, most)

    monkeypatch.setattr(Sampler, "_sample", note)
    answers = mouth.answer(prompts, None, 0, 6)
    assert used == [(2, 0.7), (1, 0.0), (1, 0.1)]
    (alone,) = mouth.answer(prompts[1:2], 0, 5, 6)
    assert answers[1] == alone, "greedy, whatever is sampled beside it"


def test_alpaca_evals_own_loader_reads_the_answers(material, store_path, tmp_path):
    file = tmp_path / "questions.json"
    questions = [{"instruction": text, "dataset": "made up"} for text in QUESTIONS]
    file.write_text(json.dumps(questions))
    evaluate(config(material, tmp_path / "out", file))
    script = (
        "import sys, json; from alpaca_eval import utils\n"
        "frame = utils.load_or_convert_to_dataframe(sys.argv[1])\n"
        "print(json.dumps([utils.get_generator_name(None, frame), frame.to_dict('records')]))\n"
    )
    (answers,) = (tmp_path / "out/questions/model_answer").iterdir()
    done = subprocess.run(
        [sys.executable, "-c", script, answers], capture_output=True, text=True, check=True
    )
    name, rows = json.loads(done.stdout.splitlines()[-1])
    samples = (tmp_path / "out/questions/samples.jsonl").read_text().splitlines()
    assert name == "policy-t0.7"
    assert [row["instruction"] for row in rows] == QUESTIONS
    assert [row["output"] for row in rows] == [
        json.loads(line)["turns"][0]["text"] for line in samples
    ]


def test_mt_bench_answers_are_as_fastchat_reads_them(material, store_path, tmp_path):
    """Its judge takes answer[question_id]["choices"][0]["turns"][i]."""
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81 + i, "category": "writing", "turns": [text, "again"]}
        for i, text in enumerate(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(config(material, tmp_path / "out", file))
    (answers,) = (tmp_path / "out/question/model_answer").iterdir()
    found = {}
    for line in answers.read_text().splitlines():
        row = json.loads(line)
        found[row["question_id"]] = row
    assert list(found) == [81, 82, 83]
    for row in found.values():
        assert row["model_id"] == answers.stem
        assert all(isinstance(text, str) for text in row["choices"][0]["turns"])
        assert len(row["choices"][0]["turns"]) == 2


def test_arena_hard_answers_are_as_its_judge_reads_them(material, store_path, tmp_path):
    """It takes answer[uid]["messages"][-1]["content"]["answer"]."""
    file = tmp_path / "question.jsonl"
    rows = [{"uid": f"u{i}", "category": "x", "prompt": t} for i, t in enumerate(QUESTIONS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(config(material, tmp_path / "out", file))
    (answers,) = (tmp_path / "out/question/model_answer").iterdir()
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["uid"] for row in found] == ["u0", "u1", "u2"]
    for row, text in zip(found, QUESTIONS, strict=True):
        assert row["messages"][0] == {"role": "user", "content": text}
        assert isinstance(row["messages"][-1]["content"]["answer"], str)


def test_arena_hard_01_answers_have_records_as_turns(material, store_path, tmp_path):
    file = tmp_path / "question.jsonl"
    rows = [{"question_id": f"q{i}", "turns": [{"content": t}]} for i, t in enumerate(QUESTIONS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(config(material, tmp_path / "out", file))
    (answers,) = (tmp_path / "out/question/model_answer").iterdir()
    for line in answers.read_text().splitlines():
        (turn,) = json.loads(line)["choices"][0]["turns"]
        assert isinstance(turn["content"], str)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ('{"prompt": "a"}\n\n{"instruction": "b"}\n', [("a",), ("b",)]),
        ('[{"turns": ["a", "b"], "question_id": 1}]', [("a", "b")]),
        ('{"turns": [{"content": "a"}]}', [("a",)]),
        ('  [{"prompt": "ünï"}]', [("ünï",)]),
        ('{"prompt": "one\u2028two"}\r\n{"prompt": "b"}', [("one\u2028two",), ("b",)]),
    ],
)
def test_prompt_files(tmp_path, text, turns):
    file = tmp_path / "prompts"
    file.write_text(text)
    assert [prompt.turns for prompt in read_prompts(file)] == turns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": ""}', "record 1 of"),
        ('{"prompt": "a"}\n{"question": "b"}', "record 2 of"),
        ('["a"]', "record 1 of"),
        ('{"turns": ["a", 3]}', "record 1 of"),
        ('{"turns": []}', "record 1 of"),
        ('{"turns": ["a", "b"]}', "several turns and no question_id"),
        ("{", "neither JSON nor JSONL"),
        ("[]", "has no prompts"),
        ("", "has no prompts"),
    ],
)
def test_invalid_prompts_are_reported(tmp_path, text, message):
    file = tmp_path / "prompts"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(file)
    with pytest.raises(UserError, match="do not exist"):
        read_prompts(tmp_path / "nothing")
