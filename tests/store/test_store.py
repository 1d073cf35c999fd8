"""The store as a public contract (docs/format.md): layout, gaps, damage, versions, golden file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import attributes_of, made_up, rows_of
from stores import attributes, contents, write_root

from fpocli.store.metadata import DOCUMENT
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.schema import fingerprint, index_dtype
from fpocli.store.verify import find_damage
from fpocli.store.writer import StoreWriter
from fpocli.system.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SITE = "layer_3.resid_post"


@pytest.fixture
def store(store_path, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(store_path, tmp_path / "ref.zarr")


def test_layout_is_the_documented_one(store_path):
    arrays = contents(store_path)
    tokens, n, k, m = len(arrays["tokens"]), 21, 64, 96
    expected = {
        "tokens": ("uint32", (tokens,)),
        "spans": ("int64", (n, 4)),
        "source_row": ("int64", (n,)),
        "ref/logp": ("float32", (n, 2)),
        "ref/margin": ("float32", (n,)),
        f"features/{SITE}/index": ("uint16", (n, 2, k)),
        f"features/{SITE}/value": ("float32", (n, 2, k)),
        f"features/{SITE}/nonzero": ("int32", (n, 2)),
        f"features/{SITE}/mean": ("float32", (m,)),
        f"features/{SITE}/frequency": ("int64", (2, m)),
        "blocks/digest": ("uint64", (3,)),
        "blocks/totals": ("uint64", (3,)),
        f"blocks/{SITE}/sum": ("float64", (3, m)),
        f"blocks/{SITE}/frequency": ("int64", (3, 2, m)),
    }
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items()} == expected
    assert arrays["spans"][-1, 3] == tokens
    about = zarr.open_group(store_path, mode="r").attrs["fpo"]
    assert about["format"] == "fpo-store"
    assert (about["version"], about["state"]) == ("1.3", "complete")
    assert set(about) == {
        *("format", "version", "state", "created", "writer", "pairs", "data", "tokenizer"),
        *("limits", "model", "sites", "block", "tokens", "fingerprint", "documents", "checksum"),
        "paths",
    }
    assert about["fingerprint"] == fingerprint(about)
    assert set(about["documents"]) == {
        *expected,
        *("ref", "features", f"features/{SITE}", "blocks", f"blocks/{SITE}"),
    }


def test_stored_values_follow_the_rules_of_the_format(store_path):
    arrays = contents(store_path)
    index, value = arrays[f"features/{SITE}/index"], arrays[f"features/{SITE}/value"]
    used = value > 0
    assert (np.diff(value, axis=-1) <= 0).all()
    assert (index[~used] == 65_535).all() and (value[~used] == 0).all()
    assert (index[used] < 96).all()
    nonzero = arrays[f"features/{SITE}/nonzero"]
    assert (used.sum(-1) == np.minimum(nonzero, 64)).all()
    assert (nonzero < 64).any(), "some response has unused slots"
    counts = np.diff(arrays["spans"][:, 1:])
    average = arrays["ref/logp"] / counts
    assert np.allclose(arrays["ref/margin"], average[:, 0] - average[:, 1], atol=1e-6)


@pytest.mark.parametrize(("m", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_the_fill_value_of_indices_is_never_a_feature(m, dtype):
    assert index_dtype(m) == dtype


def read_all(store: Store) -> None:
    assert store.unscored_blocks() == []
    for block in range(store.blocks):
        store.reference(block, store.tokens(block))
    for site in store.sites:
        store.mean(site)
        store.frequency(site)


def change(path: Path, **fields) -> None:
    """Write the root's document again, with its checksum."""
    write_root(path, attributes(path) | fields)


def test_only_a_complete_store_of_this_version_is_used(store):
    change(store, version="1.7")
    Store.open(store).require_complete()
    change(store, version="2.0")
    with pytest.raises(UserError, match=r"version 2\.0"):
        Store.open(store)
    change(store, version="1.2", state="partial")
    with pytest.raises(UserError, match="3 of 3 blocks"):
        Store.open(store).require_complete()


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        ({"block": 2**40}, "a chunk of spans would take"),
        ({"block": 0}, "cannot be of"),
        ({"block": True}, "block is missing or of the wrong type"),
        ({"tokens": 3}, "21 pairs in blocks of 8 cannot be of 3 tokens"),
        ({"tokens": 2**60}, "the array tokens .* has 1 of 4,398,046,511,104 chunks"),
        ({"pairs": {"read": 9, "kept": 2**50, "dropped": {}}, "tokens": 2**60}, "of .* chunks"),
        ({"pairs": {"read": 9, "kept": 21, "dropped": {}, "not_finite": [21]}}, "not_finite"),
        ({"sites": {"../../x": {}}}, r"sites\.\.\./\.\./x: .* is missing"),
        ({"sites": []}, "sites is missing"),
        ({"state": "done"}, "the state done is unknown"),
        ({"fingerprint": "0"}, "fingerprint is not of the rest"),
        ({"documents": {"../..": "0"}}, "leads out of the store"),
        ({"documents": {"ref": 1}}, "documents are no sums"),
    ],
)
def test_invalid_attributes_are_refused_before_memory_is_allocated(store, change_of, message):
    """They are compared with each other, although their checksum is correct."""
    change(store, **change_of)
    if "fingerprint" not in change_of:
        about = attributes(store)
        change(store, fingerprint=fingerprint(about))
    with pytest.raises(UserError, match=message):
        Store.open(store)


@pytest.mark.parametrize("imported", ["a file", {"source": "a", "fingerprint": 1}])
def test_a_wrong_origin_of_log_probabilities_is_refused(store, imported):
    change(store, model=attributes(store)["model"] | {"imported": imported})
    change(store, fingerprint=fingerprint(attributes(store)))
    with pytest.raises(UserError, match=r"model\.imported.* is missing or of the wrong type"):
        Store.open(store)


def test_links_out_of_the_store_are_refused(store, tmp_path):
    (store / "ref").rename(tmp_path / "elsewhere")
    (store / "ref").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the store"):
        Store.open(store)


def test_other_codecs_are_refused(store):
    document = json.loads((store / "spans" / DOCUMENT).read_text())
    document["codecs"].pop()
    (store / "spans" / DOCUMENT).write_text(json.dumps(document))
    about = attributes(store)
    del about["documents"]["spans"]
    write_root(store, about)
    with pytest.raises(UserError, match=r"spans of .* has the codecs bytes, zstd, expected"):
        Store.open(store)


def test_a_missing_or_wrong_array_is_refused(store):
    shutil.rmtree(store / "ref" / "margin")
    with pytest.raises(UserError, match=r"ref/margin/zarr\.json is missing"):
        Store.open(store)
    zarr.open_group(store, mode="r+").create_array("ref/margin", shape=(21,), dtype="float64")
    with pytest.raises(UserError, match=r"ref/margin/zarr\.json is damaged or was edited"):
        Store.open(store)
    about = attributes(store)
    del about["documents"]["ref/margin"]
    write_root(store, about)
    with pytest.raises(UserError, match=r"ref/margin of .* is float64"):
        Store.open(store)
    shutil.rmtree(store / "ref" / "margin")
    with pytest.raises(UserError, match="lacks the array ref/margin"):
        Store.open(store)


def test_each_block_has_chunks_of_its_own(tmp_path):
    """Two processes that write parts of one chunk lose data without an error, so writing a block
    touches no file of another block, for any number of pairs and size of block."""

    @settings(max_examples=12)
    @given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 2**32))
    def check(pairs, block, seed):
        path = tmp_path / f"{pairs}-{block}-{seed}"
        if path.exists():
            return
        tokens, vectors = made_up(pairs, seed)
        store = StoreWriter.create(Folder(path), attributes_of(pairs, block), tokens)
        store._set_state("partial")
        owners: dict[Path, int] = {}
        before = stamps(path)
        for number in range(store.blocks):
            store.write_block(number, *rows_of(vectors, store.pairs_in(number)))
            after = stamps(path)
            for file in {file for file, stamp in after.items() if before.get(file) != stamp}:
                assert owners.setdefault(file, number) == number
            before = after
        assert set(owners.values()) == set(range(store.blocks))

    check()


def stamps(path: Path) -> dict[Path, tuple[int, int]]:
    """Every file, with its inode and time, which change when it is written: zarr replaces files."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_remove_deletes_only_stores(store, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not an fpo store"):
        StoreWriter.remove(Folder(precious))
    assert (precious / "thesis.txt").exists()
    zarr.create_group(tmp_path / "other.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="r+").create_array("x", shape=(1,), dtype="i4")
    with pytest.raises(UserError, match="not an fpo store"):
        StoreWriter.remove(Folder(tmp_path / "other.zarr"))
    StoreWriter.remove(Folder(store))
    assert not store.exists()


# -- writing in any order ----------------------------------------------------------------------


@settings(max_examples=12)
@given(st.integers(1, 17), st.integers(1, 6), st.randoms(use_true_random=False))
def test_content_does_not_depend_on_order_or_interruption(tmp_path_factory, pairs, block, rng):
    tokens, vectors = made_up(pairs, 1)
    meta = attributes_of(pairs, block)
    results = []
    for shuffled in (False, True):
        path = tmp_path_factory.mktemp("store") / "s.zarr"
        store = StoreWriter.create(Folder(path), meta, tokens)
        assert Store.open(path).meta["state"] == "tokenised"
        order = list(range(store.blocks))
        if shuffled:
            rng.shuffle(order)
        for number in order:
            if shuffled:  # every block by a different writer
                store = StoreWriter.open(path)
            store.write_block(number, *rows_of(vectors, store.pairs_in(number)))
            assert number not in store.unscored_blocks()
        store.finish()
        results.append(contents(path))
    first, second = results
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    pooled = np.stack(vectors).astype(np.float32)
    expected = pooled.mean((0, 1), dtype=np.float64)
    np.testing.assert_allclose(first[f"features/{SITE}/mean"], expected, rtol=1e-6)
    np.testing.assert_array_equal(first[f"features/{SITE}/frequency"], (pooled > 0).sum(0))


def test_a_store_with_missing_or_damaged_blocks_is_not_completed(tmp_path):
    tokens, vectors = made_up(5, 2)
    path = tmp_path / "s.zarr"
    store = StoreWriter.create(Folder(path), attributes_of(5, 2), tokens)
    for block in (0, 1):
        store.write_block(block, *rows_of(vectors, store.pairs_in(block)))
    with pytest.raises(UserError, match="ref/logp, block 2"):
        store.finish()
    store.write_block(2, *rows_of(vectors, store.pairs_in(2)))
    (path / "ref/margin/c/1").rename(tmp_path / "margin")
    with pytest.raises(UserError, match="ref/margin, block 1"):
        store.finish()
    assert Store.open(path).meta["state"] == "partial"
    (tmp_path / "margin").rename(path / "ref/margin/c/1")
    store.finish()
    Store.open(path).require_complete()


def test_a_store_that_is_replaced_is_not_read_any_further(store, tmp_path):
    """Its blocks would be complete, but of another model."""
    reading = Store.open(store)
    tokens = reading.tokens(0)
    change(store, model=attributes(store)["model"] | {"hash": "another"})
    change(store, fingerprint=fingerprint(attributes(store)))
    with pytest.raises(UserError, match="was replaced or removed"):
        reading.reference(0, tokens)
    shutil.rmtree(store)
    with pytest.raises(UserError):
        reading.reference(0, tokens)


def test_missing_values_are_not_valid_numbers(tmp_path):
    tokens, _ = made_up(5, 2)
    meta = attributes_of(5, 2)
    StoreWriter.create(Folder(tmp_path / "s.zarr"), meta, tokens)
    arrays = contents(tmp_path / "s.zarr")
    for name in ("ref/logp", "ref/margin", f"features/{SITE}/value", f"features/{SITE}/mean"):
        assert np.isnan(arrays[name]).all()
    assert Store.open(tmp_path / "s.zarr").unscored_blocks() == [0, 1, 2]


# -- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.3"])
def test_the_golden_store_reads_as_it_did(version):
    """Written by that version and committed; every later version must read it bit for bit."""
    path = GOLDEN / f"ref-{version}.zarr"
    expected = json.loads(path.with_suffix(".json").read_text())
    store = Store.open(path)
    store.require_complete()
    read_all(store)
    assert find_damage(store) == []
    arrays = contents(path)
    assert sorted(arrays) == sorted(expected["arrays"])
    for name, values in expected["arrays"].items():
        actual = arrays[name]
        assert str(actual.dtype) == values["dtype"]
        np.testing.assert_array_equal(
            actual, np.array(values["data"], values["dtype"]).reshape(values["shape"])
        )
    assert attributes(path) == expected["fpo"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < 200_000
