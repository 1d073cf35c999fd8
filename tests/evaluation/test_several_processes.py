"""fpo eval on several processes: the figures of one process, and samples that are resumed."""

import json

import pytest
from processes import Command, results, together
from runs import run

PROMPTS = [{"instruction": text} for text in ("the cat", "why?", "say x = y", "a hat", "code :")]


@pytest.fixture(scope="module")
def words(material, store_path, tmp_path_factory):
    """A run of 4 held-out pairs, and the command that evaluates it."""
    folder = tmp_path_factory.mktemp("run")
    run(material, folder / "run", "--no-bf16")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return (
        "eval", str(folder / "run"), "--cache", str(store_path), "--split", "all",
        "--reference", str(material / "model"), "--generate", str(folder / "prompts.json"),
        "--temperature", "0.7", "--temperature", "0", "--max-new-tokens", "6",
        "--batch-size", "1", "--packed-length", "200", "--device", "cpu",
    )  # fmt: skip


def finish(processes):
    done = results(*processes)
    assert [one.returncode for one in done] == [0] * len(done), [one.stderr[-2000:] for one in done]
    return [one.stdout for one in done]


@pytest.fixture(scope="module")
def one(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    finish([Command(*words, "--out", str(out), "--json")])
    return out


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def sampled(out):
    rows = read_lines(out / "prompts/samples.jsonl")
    return sorted(rows, key=lambda row: (row["temperature"], row["prompt"]))


def assert_close(one, other):
    """The same JSON, numbers up to rounding."""
    if isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_close(list(one.values()), list(other.values()))
    elif isinstance(one, list):
        assert len(one) == len(other)
        for own, expected in zip(one, other, strict=True):
            assert_close(own, expected)
    else:
        assert one == other


@pytest.mark.parametrize("count", [2, 3])
def test_figures_and_answers_are_those_of_one_process(words, one, tmp_path, count):
    """Up to the last bits: on some CPUs a product's depend on the number of its rows."""
    first, *others = finish(together([*words, "--out", str(tmp_path), "--json"], count))
    assert first.rstrip() == (tmp_path / "eval.json").read_text().rstrip()
    assert others == [""] * (count - 1), "only rank 0 prints"
    assert_close(json.loads(first), json.loads((one / "eval.json").read_text()))
    rows, expected = (read_lines(folder / "pairs.jsonl") for folder in (tmp_path, one))
    assert_close(rows, expected)
    assert_close(sampled(tmp_path), sampled(one))
    answers = [path.relative_to(one) for path in one.glob("prompts/model_answer/*.json")]
    assert len(answers) == 2
    for path in answers:
        assert (tmp_path / path).read_text() == (one / path).read_text()
    assert not list(tmp_path.glob("prompts/samples.*.jsonl"))


def test_answers_of_a_killed_run_are_kept_whatever_the_number_of_processes(words, one, tmp_path):
    """As two killed processes leave them: complete batches in two files, and a cut line."""
    (tmp_path / "prompts").mkdir()
    lines = (one / "prompts/samples.jsonl").read_text().splitlines(keepends=True)
    marked = [json.dumps(json.loads(line) | {"kept": True}) + "\n" for line in lines[:4]]
    (tmp_path / "prompts/samples.json").write_text((one / "prompts/samples.json").read_text())
    (tmp_path / "prompts/samples.jsonl").write_text("".join(marked[:2]))
    (tmp_path / "prompts/samples.1.jsonl").write_text("".join(marked[2:]) + lines[5][:20])
    finish(together([*words, "--out", str(tmp_path)], 2))
    assert sum("kept" in row for row in sampled(tmp_path)) == 4
    plain = [{name: row[name] for name in row if name != "kept"} for row in sampled(tmp_path)]
    assert plain == sampled(one)


def test_an_error_of_one_process_ends_all(words, tmp_path):
    """Samples of other settings are found by rank 0, which reports them; the others exit."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/samples.json").write_text("{}")
    (tmp_path / "prompts/samples.jsonl").write_text("")
    processes = together([*words, "--out", str(tmp_path)], 2)
    assert [process.wait(120) for process in processes] == [2, 2]
    messages = [process.messages() for process in processes]
    assert "was sampled with other settings" in messages[0]
    assert "error" not in messages[1]
    for process in processes:
        process.close()
