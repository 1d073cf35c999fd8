"""fpo cache --reference-logps: what TRL and open-instruct computed, and mistakes in it."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, load_from_disk
from runs import command, finish, read
from stores import attributes, cache_config, contents, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpocli import InspectConfig, Store, UserError, cache, inspect

# TRL still uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def plain(**changes):
    """Without features, as an import is."""
    return {"layer": [], "sae": []} | changes


@pytest.fixture(scope="module")
def scored(material, tmp_path_factory):
    """fpo's own store without features."""
    path = tmp_path_factory.mktemp("scored") / "ref.zarr"
    cache(cache_config(material, path, **plain()))
    return path


@pytest.fixture(scope="module")
def from_trl(material, tmp_path_factory):
    """The data set that TRL's own trainer has after it precomputed the reference, saved."""
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder / "run"),
            precompute_ref_log_probs=True,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(material / "model"),
    )
    trainer.train_dataset.save_to_disk(folder / "data")
    trainer.train_dataset.to_parquet(folder / "data.parquet")
    return folder


def logps(store) -> np.ndarray:
    return Store.open(store).read_array("ref/logp")


def write_cache(path, values) -> str:
    """As open-instruct's TensorCache writes it."""
    chosen, rejected = torch.tensor(values, dtype=torch.float32).unbind(1)
    torch.save({"chosen_logps": chosen, "rejected_logps": rejected}, path)
    return str(path)


@pytest.mark.parametrize("name", ["data", "data.parquet"])
def test_trls_data_set_with_its_tokens(material, from_trl, tmp_path, name):
    data, out = str(from_trl / name), tmp_path / "ref.zarr"
    store = cache(cache_config(material, out, **plain(data=[data], reference_logps=data)))
    rows = load_from_disk(str(from_trl / "data"))
    assert store.pairs == len(rows) == 21
    for number, row in enumerate(rows):
        pair = store.pair(number)
        for own, column in zip((pair.prompt, pair.chosen, pair.rejected), IDS, strict=True):
            assert own.tolist() == row[column]
    expected = np.array([rows["ref_chosen_logps"], rows["ref_rejected_logps"]], np.float32).T
    np.testing.assert_array_equal(logps(out), expected)
    assert store.imported["source"] == data and store.imported["reduction"] == "sum"


@pytest.mark.parametrize("averages", [False, True])
def test_open_instructs_cache(material, scored, tmp_path, averages):
    """By row of the data, with fpo's tokens; averages are multiplied by the lengths."""
    values, counts = logps(scored), np.diff(Store.open(scored).read_array("spans"))[:, 1:]
    file = write_cache(tmp_path / "cache.pt", values / counts if averages else values)
    out = tmp_path / "ref.zarr"
    settings = plain(reference_logps=file, reference_averages=averages)
    cache(cache_config(material, out, **settings))
    one, two = contents(scored), contents(out)
    np.testing.assert_allclose(two["ref/logp"], one["ref/logp"], rtol=1e-6)
    np.testing.assert_allclose(two["ref/margin"], one["ref/margin"], atol=1e-6)
    np.testing.assert_array_equal(two["tokens"], one["tokens"])
    # Another content, and it says so.
    about, own = attributes(out), attributes(scored)
    assert about["fingerprint"] != own["fingerprint"]
    assert "imported" not in own["model"]
    assert about["model"]["imported"]["reduction"] == ("mean" if averages else "sum")


def test_a_data_set_of_a_store_comes_back(material, scored, tmp_path):
    """fpocli.trl.store_dataset has token ids alone, and no text."""
    from fpocli.trl import store_dataset

    file = tmp_path / "pairs.parquet"
    store_dataset(str(scored)).to_parquet(file)
    out = tmp_path / "ref.zarr"
    cache(cache_config(material, out, **plain(data=[str(file)], reference_logps=str(file))))
    one, two = contents(scored), contents(out)
    for name in ("tokens", "spans", "ref/logp", "ref/margin"):
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.slow
def test_training_from_an_import_starts_at_the_reference(material, from_trl, tmp_path):
    """And takes the steps of a store that fpo scored, up to TRL's rounding."""
    data, out = str(from_trl / "data.parquet"), tmp_path / "ref.zarr"
    cache(cache_config(material, out, **plain(data=[data], reference_logps=data)))
    words = command(material, tmp_path / "run", "--no-bf16", cache=out, method="dpo")
    done = finish(words)
    assert done.returncode == 0, done.stderr
    first = next(line for line in read(tmp_path / "run") if line["split"] == "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_training_refuses_an_import_that_is_not_the_reference(material, scored, tmp_path):
    """Values that only the check of training sees: those after the pairs that fpo cache scored."""
    import fpocli.caching.imported as imported

    file = write_cache(tmp_path / "cache.pt", logps(scored) - 5)
    out = tmp_path / "ref.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(imported.LARGEST_GAP, "float32", 1e9)
        cache(cache_config(material, out, **plain(reference_logps=file)))
    done = finish(command(material, tmp_path / "run", "--no-bf16", cache=out, method="dpo"))
    assert done.returncode == 2
    assert "should be the reference" in done.stderr and "were imported" in done.stderr


def test_inspect_says_where_they_come_from(material, scored, tmp_path, capsys):
    file = write_cache(tmp_path / "cache.pt", logps(scored))
    out = tmp_path / "ref.zarr"
    cache(cache_config(material, out, **plain(reference_logps=file)))
    shown = inspect(InspectConfig(store=str(out)))
    assert shown["model"]["imported"]["source"] == file
    assert "not computed here: sums of" in capsys.readouterr().out


def test_an_interrupted_import_resumes_with_the_same_file_only(material, scored, tmp_path):
    values, out = logps(scored), tmp_path / "ref.zarr"
    values[13] = np.nan
    broken = plain(reference_logps=write_cache(tmp_path / "broken.pt", values))
    with pytest.raises(UserError, match="no finite value in row 13") as error:
        cache(cache_config(material, out, **broken))
    assert "--drop-non-finite" in error.value.hint
    other = plain(reference_logps=write_cache(tmp_path / "other.pt", logps(scored) - 1e-6))
    with pytest.raises(UserError, match="made with other settings"):
        cache(cache_config(material, out, **other))
    store = cache(cache_config(material, out, **broken, drop_non_finite=True))
    assert store.non_finite == [13] and store.scored == 20


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda v, n: v / n, "are not those of", "--reference-averages"),
        (lambda v, n: v[::-1], "are not those of", "order"),
        (lambda v, n: v - 0.1 * n, "are not those of", "template"),
        (lambda v, n: v[:-1], "has 20 rows, and the data 21", "--data"),
        (lambda v, n: np.concatenate([v, v]), "has 42 rows, and the data 21", "--data"),
        (lambda v, n: -v, "no log-probability is above 0", "name the file"),
    ],
)
def test_values_of_something_else_are_refused(material, scored, tmp_path, change, message, hint):
    """Before a store is written."""
    counts = np.diff(Store.open(scored).read_array("spans"))[:, 1:]
    file = write_cache(tmp_path / "cache.pt", change(logps(scored), counts).copy())
    out = tmp_path / "ref.zarr"
    with pytest.raises(UserError, match=message) as error:
        cache(cache_config(material, out, **plain(reference_logps=file)))
    assert hint in error.value.hint
    assert not out.exists()


def test_sums_are_not_averages(material, scored, tmp_path):
    file = write_cache(tmp_path / "cache.pt", logps(scored))
    settings = plain(reference_logps=file, reference_averages=True)
    with pytest.raises(UserError, match="are not those of") as error:
        cache(cache_config(material, tmp_path / "ref.zarr", **settings))
    assert "they are sums: leave out --reference-averages" in error.value.hint


@pytest.mark.parametrize("missing", [lambda n: n != 7, lambda n: n % 2])
def test_missing_values_do_not_hide_wrong_ones(material, scored, tmp_path, missing):
    """What is compared has values: missing ones are no agreement."""
    values = logps(scored) - 0.1
    values[[number for number in range(len(values)) if missing(number)]] = np.nan
    file = write_cache(tmp_path / "cache.pt", values.tolist())
    changes = plain(reference_logps=file, drop_non_finite=True)
    with pytest.raises(UserError, match="are not those of"):
        cache(cache_config(material, tmp_path / "ref.zarr", **changes))


def test_weights_of_another_model_are_refused(material, scored, tmp_path):
    file = write_cache(tmp_path / "cache.pt", logps(scored))
    settings = plain(reference_logps=file, model=str(material / "policy"))
    with pytest.raises(UserError, match="are not those of"):
        cache(cache_config(material, tmp_path / "ref.zarr", **settings))


def test_files_that_hold_no_log_probabilities(material, tmp_path):
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"chosen_logps": torch.zeros(21)}, tmp_path / "half.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(tiny.tokenizer, tmp_path / "code.pt")
    (tmp_path / "rows.jsonl").write_text('{"ref_chosen_logps": "a", "ref_rejected_logps": 1}\n')
    write_pairs(tmp_path / "pairs.jsonl", 21)
    for name, message in {
        "text.pt": "no file of tensors",
        "code.pt": "no file of tensors",
        "half.pt": "does not hold chosen_logps and rejected_logps",
        "list.pt": "does not hold",
        "none.pt": "does not exist",
        "rows.jsonl": "are no numbers",
        "pairs.jsonl": "line 1 has no columns ref_chosen_logps",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            settings = plain(reference_logps=str(tmp_path / name))
            cache(cache_config(material, tmp_path / "ref.zarr", **settings))
        assert error.value.hint, name


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": [3]},
        {"distributions": "4"},
        {"workers": 2},
        {"ray": "auto"},
        {"deduplicate": True},
        {"data": ["a.jsonl", "b.jsonl"]},
        {"reference_logps": None, "reference_averages": True},
    ],
)
def test_flags_that_do_not_go_together(material, tmp_path, changes):
    with pytest.raises(UserError, match="--reference-") as error:
        cache_config(material, tmp_path, **plain(reference_logps="cache.pt") | changes)
    assert error.value.hint


def test_rows_of_token_ids_that_are_dropped(material, scored, tmp_path):
    from fpocli.trl import store_dataset

    rows = store_dataset(str(scored)).to_list()
    rows[0]["prompt_ids"] = []
    rows[1]["chosen_ids"] = []
    rows[2]["chosen_ids"] = rows[2]["rejected_ids"]
    rows[3]["chosen_ids"] = [tiny.VOCABULARY]
    rows[4]["chosen_ids"] = "text"
    rows[5]["rejected_ids"] = None
    rows[6]["prompt_ids"] = [5] * 160
    rows[7]["chosen_ids"] = [5] * 500
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = cache(
        cache_config(
            material,
            tmp_path / "ref.zarr",
            **plain(data=[str(file)], reference_logps=str(file)),
            max_prompt_length=159,
            max_length=480,
        )
    )
    assert store.meta["pairs"]["dropped"] == {
        "empty prompt": 1,
        "empty response": 1,
        "equal responses": 1,
        "wrong type": 2,
        "missing field": 1,
        "prompt too long": 1,
        "response too long": 1,
    }
    assert store.read_array("source_row").tolist() == list(range(8, 21))


def test_a_dry_run_of_token_ids_has_nothing_to_show(material, from_trl):
    from fpocli import preview

    data = str(from_trl / "data")
    config = cache_config(material, "unused", **plain(data=[data], reference_logps=data))
    with pytest.raises(UserError, match="token ids already"):
        preview(config)
