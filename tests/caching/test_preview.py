"""fpo cache --dry-run shows what the store would hold, and loads no model."""

import json
import shutil

import pytest
from processes import Command, flags, results
from stores import cache_config
from typer.testing import CliRunner

from fpocli import UserError, cache, preview
from fpocli.cli.commands import app
from fpocli.data.tokenizer import load_tokenizer
from fpocli.system.model_folder import find_model


@pytest.fixture
def config(material, tmp_path):
    """Rows of three layouts, one without an answer, and a model without weights."""
    shutil.copytree(material / "model", tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    long = " ".join(["the cat sat on the mat"] * 40)
    rows = [
        {"prompt": "the <eos> cat", "chosen": "sat on a mat", "rejected": "ran"},
        {"prompt": "the cat", "chosen": "", "rejected": "ran"},
        {"instruction": "the cat", "output": ["sat <eos> on", "ran"]},
        {"question": "the cat", "chosen": long, "rejected": "ran"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cache_config(
        material, tmp_path / "ref.zarr", data=str(tmp_path / "rows.jsonl"), max_length=90
    )


def test_the_pairs_are_those_of_the_store(config, tmp_path, capsys):
    found = preview(config)
    store = cache(config)
    tokens = store.tokens(0)
    tokenizer = load_tokenizer(find_model(config.model))
    assert found["read"] == 4 and found["kept"] == store.pairs == 3
    assert found["dropped"] == {"empty response": 1}
    assert found["layouts"] == {"text": 2, "Alpaca": 1}
    for number, pair in enumerate(found["pairs"]):
        stored = tokens.pair(number)
        assert pair["row"] == stored.row
        for name, part in pair["parts"].items():
            ids = list(getattr(stored, name))
            assert part["tokens"] == len(ids) and part["scored"] == (name != "prompt")
            assert "".join(piece["text"] for piece in part["pieces"]) == tokenizer.decode(ids)
    assert [pair["parts"]["chosen"]["truncated"] for pair in found["pairs"]] == [0, 0, 1]
    assert not any(pair["parts"]["rejected"]["truncated"] for pair in found["pairs"])
    # The data's own <eos> is text, the template's is not.
    special = [
        piece["special"] for piece in found["pairs"][0]["parts"]["prompt"]["pieces"]
        if "<eos>" in piece["text"]
    ]  # fmt: skip
    assert special == [False]
    printed = capsys.readouterr().out
    assert "rows.jsonl, line 1, layout: text" in printed
    assert "── prompt, " in printed and "not scored" in printed and ", truncated" in printed
    assert "dropped 1: empty response" in printed


def test_no_model_is_loaded_and_nothing_written(config, tmp_path):
    words = [*flags(config), "--model", str(tmp_path / "model"), "--dry-run"]
    (done,) = results(Command("cache", *words))
    assert done.returncode == 0, done.stderr
    assert "3 pairs of the first 4 rows" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


def test_what_cannot_be_used_is_refused_as_by_the_command(config, tmp_path):
    file = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, ["cache", *flags(config), "--dry-run", "--strict"])
    assert done.exit_code == 2 and f"{file}, line 2: empty response" in done.stderr
    file.write_text('{"prompt": "q", "completion": "a", "label": true}\n')
    with pytest.raises(UserError, match="no pair is left of 1 rows"):
        preview(config)
