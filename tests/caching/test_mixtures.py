"""Stores of several sources: their shares, their order, and where each pair is from."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import zarr
from stores import cache_config, set_attributes, write_pairs
from typer.testing import CliRunner

from fpocli import UserError, cache, preview
from fpocli.cli.commands import app
from fpocli.data.tokenizer import load_tokenizer
from fpocli.store.reader import Store
from fpocli.store.verify import find_damage
from fpocli.system.model_folder import find_model


@pytest.fixture
def files(tmp_path):
    return [write_pairs(tmp_path / f"{name}.jsonl", n, n) for name, n in (("a", 30), ("b", 11))]


def mixture(material, tmp_path, data, **changes):
    changes = {"layer": [], "sae": [], "data": list(map(str, data))} | changes
    return cache_config(material, tmp_path / "ref.zarr", **changes)


def check_provenance(store, files):
    """Every pair's texts are those of its row of its source."""
    tokenizer = load_tokenizer(find_model(store.meta["model"]["source"]))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    sources = store.sources()
    for number in range(store.pairs):
        pair = store.pair(number)
        assert pair.source == sources[number]
        row = rows[pair.source][pair.row]
        assert tokenizer.decode(pair.chosen, skip_special_tokens=True) == row["chosen"]
        assert tokenizer.decode(pair.rejected, skip_special_tokens=True) == row["rejected"]
    return sources


def test_without_weights_all_pairs_are_used_and_spread(material, tmp_path, files):
    store = cache(mixture(material, tmp_path, files))
    sources = check_provenance(store, files)
    assert store.pairs == 41 and np.bincount(sources).tolist() == [30, 11]
    assert store.meta["pairs"]["sources"]["kept"] == [30, 11]
    # In every part of the store, as many of the second as its share is.
    for start in range(41 - 15):
        assert abs(sources[start : start + 15].sum() - 15 * 11 / 41) < 2


def test_weights_are_shares_and_the_smaller_source_ends_it(material, tmp_path, files):
    store = cache(mixture(material, tmp_path, [f"{files[0]}:1", f"{files[1]}:0.5"]))
    sources = check_provenance(store, files)
    assert np.bincount(sources).tolist() == [23, 11]
    rows = store.read_array("source_row")
    for number in (0, 1):
        own = rows[sources == number]
        assert own.tolist() == list(range(len(own)))


def test_a_source_without_a_weight_has_the_weight_1(material, tmp_path, files):
    store = cache(mixture(material, tmp_path, [f"{files[0]}:2", files[1]]))
    assert np.bincount(store.sources()).tolist() == [23, 11]


def test_the_same_command_gives_the_same_store_and_another_weight_another(
    material, tmp_path, files
):
    config = mixture(material, tmp_path, [f"{files[0]}:2", files[1]])
    first = cache(config)
    again = cache(replace(config, out=str(tmp_path / "again.zarr")))
    assert first.meta["fingerprint"] == again.meta["fingerprint"]
    assert np.array_equal(first.sources(), again.sources())
    assert cache(config).meta["created"] == first.meta["created"]
    with pytest.raises(UserError, match=r"data\.sources\.0\.weight is 2\.0 there, 3\.0 here"):
        cache(replace(config, data=[f"{files[0]}:3", str(files[1])]))
    with pytest.raises(UserError, match="made with other settings"):
        cache(replace(config, data=[str(files[0])]))


def test_a_mixture_may_be_resumed_from_another_folder(material, tmp_path, files, monkeypatch):
    config = mixture(material, tmp_path, [f"{files[0]}:2", files[1]])
    cache(config)
    monkeypatch.chdir(tmp_path)
    data = [f"{files[0].name}:2", files[1].name]
    assert cache(replace(config, data=data)).meta["state"] == "complete"


def test_equal_pairs_of_two_sources_are_found(material, tmp_path, files):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(files[1].read_bytes())
    store = cache(mixture(material, tmp_path, [files[1], copy], deduplicate=True))
    assert store.meta["pairs"]["kept"] == 11
    assert store.meta["pairs"]["dropped"] == {"duplicate": 11}
    assert store.meta["pairs"]["sources"]["kept"] == [11, 0]
    assert check_provenance(store, [files[1], copy]).max() == 0


def test_limit_and_score_margin_are_of_each_source(material, tmp_path, files):
    store = cache(mixture(material, tmp_path, files, limit=5))
    assert store.meta["pairs"]["sources"]["kept"] == [5, 5]


@pytest.mark.parametrize("weight", ["0", "0.000", "9" * 400])
def test_a_weight_of_nothing_is_refused(material, tmp_path, files, weight):
    """It would be none, and all pairs would be used."""
    with pytest.raises(UserError, match="a weight that is not above 0"):
        cache(mixture(material, tmp_path, [f"{files[0]}:{weight}", files[1]]))


def test_a_number_that_is_no_weight_is_no_data_set(material, tmp_path, files):
    with pytest.raises(UserError, match="neither a local path nor on the hub"):
        cache(mixture(material, tmp_path, [f"{files[0]}:-1", files[1]]))


def test_a_source_without_a_pair_is_named(material, tmp_path, files):
    files[1].write_text('{"prompt": "q"}\n')
    with pytest.raises(UserError, match=r"no pair is left of 1 rows.*b\.jsonl, line 1"):
        cache(mixture(material, tmp_path, files))


def test_a_source_of_which_nothing_is_left_is_named(material, tmp_path, files, capsys):
    """It ends a mixture with weights at once."""
    files[1].write_text(json.dumps({"prompt": "a " * 3000, "chosen": "a", "rejected": "b"}))
    store = cache(mixture(material, tmp_path, [f"{files[0]}:1", f"{files[1]}:1"]))
    assert store.pairs == 1
    assert f"no pair of {files[1]} is in the store" in capsys.readouterr().err.replace("\n", "")


def test_inspect_shows_the_sources(material, tmp_path, files):
    config = mixture(material, tmp_path, [f"{files[0]}:2", files[1]])
    store = cache(config)
    printed = CliRunner().invoke(app, ["inspect", config.out]).stdout
    margins, sources = store.read_array("ref/margin"), store.sources()
    means = [margins[sources == number].mean() for number in (0, 1)]
    # Wrapped, anywhere in a long path.
    found = "".join(printed.split())
    assert f"a.jsonl,weight2:23pairs,67.6%,meanmargin{means[0]:.4f}" in found
    assert f"b.jsonl:11pairs,32.4%,meanmargin{means[1]:.4f}" in found
    shown = json.loads(CliRunner().invoke(app, ["inspect", config.out, "--json"]).stdout)
    assert [source["pairs"] for source in shown["sources"]] == [23, 11]
    one = CliRunner().invoke(app, ["inspect", config.out, "--pair", "0"]).stdout
    assert f"row 0 of source {sources[0]}" in " ".join(one.split())
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["inspect", config.out, "--html", str(page)])
    assert done.exit_code == 0 and str(files[1]) in page.read_text()


def test_attributes_cannot_control_a_terminal(material, tmp_path, files):
    config = mixture(material, tmp_path, files)
    data = cache(config).meta["data"]
    data["sources"][0]["source"] = "\x1b]0;title\x07a.jsonl"
    set_attributes(Path(config.out), data=data)
    printed = CliRunner().invoke(app, ["inspect", config.out]).stdout
    assert "a.jsonl" in printed and "\x1b" not in printed and "\x07" not in printed


def test_damage_to_the_sources_is_found_and_repaired(material, tmp_path, files):
    config = mixture(material, tmp_path, files)
    before = cache(config).sources()
    out = Path(config.out)
    array = zarr.open_group(out, mode="r+")["source"]
    array[3] = 1 - int(array[3])
    store = Store.open(out)
    with pytest.raises(UserError, match=r"source .*is damaged"):
        store.sources()
    assert any("array source" in damage.message for damage in find_damage(store))
    assert np.array_equal(cache(replace(config, repair=True)).sources(), before)
    (out / "source/c/2").unlink()
    with pytest.raises(UserError, match=r"chunk 2 is missing"):
        Store.open(out).sources()


@pytest.mark.parametrize("weight", ["x", None, [], 0, -1.0, float("nan"), True])
def test_made_up_weights_are_refused(material, tmp_path, files, weight):
    config = mixture(material, tmp_path, files)
    data = cache(config).meta["data"]
    data["sources"][0]["weight"] = weight
    set_attributes(Path(config.out), data=data)
    with pytest.raises(UserError, match=r"a weight of data\.sources is no number above 0"):
        Store.open(config.out)


def test_made_up_counts_are_refused(material, tmp_path, files):
    config = mixture(material, tmp_path, files)
    pairs = cache(config).meta["pairs"]
    pairs["sources"]["kept"].reverse()
    set_attributes(Path(config.out), pairs=pairs)
    with pytest.raises(UserError, match=r"does not match pairs\.sources"):
        Store.open(config.out).sources()
    set_attributes(Path(config.out), pairs=pairs | {"dropped": {"duplicate": "x"}})
    with pytest.raises(UserError, match=r"pairs\.dropped are no counts"):
        Store.open(config.out)


def test_the_preview_shows_pairs_of_every_source(material, tmp_path, files):
    found = preview(mixture(material, tmp_path, files))
    assert [Path(pair["place"].partition(",")[0]).name for pair in found["pairs"]] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert found["kept"] == 41


def test_the_preview_finds_equal_pairs_of_two_sources(material, tmp_path, files):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(files[1].read_bytes())
    found = preview(mixture(material, tmp_path, [files[1], copy], deduplicate=True))
    assert (found["kept"], found["dropped"]) == (11, {"duplicate": 11})


def test_a_pair_is_named_with_its_source(material, tmp_path, files):
    tokens = cache(mixture(material, tmp_path, files)).tokens(0)
    assert tokens.place(0) == f"row {tokens.source_row[0]} of source {tokens.source[0]}"


def test_a_source_is_named_once(material, tmp_path, files):
    """In no spelling twice; two splits of one data set are two sources."""
    again = f"{tmp_path}/../{tmp_path.name}/{files[0].name}:2"
    with pytest.raises(UserError, match="is named twice"):
        cache(mixture(material, tmp_path, [files[0], again]))
    saved = tmp_path / "saved"
    parts = {
        file.stem: datasets.Dataset.from_json(str(file), cache_dir=str(tmp_path / "hf"))
        for file in files
    }
    datasets.DatasetDict(parts).save_to_disk(saved)
    store = cache(mixture(material, tmp_path, [saved, saved], split=["a", "b"]))
    assert store.meta["pairs"]["sources"]["kept"] == [30, 11]


def test_the_preview_says_what_the_weights_leave(material, tmp_path, files, capsys):
    config = mixture(material, tmp_path, [f"{files[0]}:2", files[1]])
    assert preview(config)["kept"] == cache(config).pairs == 34
    printed = capsys.readouterr()
    assert "left out 7: by the weights" in printed.out
    assert "left out 7 by the weights" in printed.err
