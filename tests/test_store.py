"""The store as a public contract (docs/format.md): layout, gaps, damage, versions, golden file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fpocli.errors import UserError
from fpocli.rows import Features, Reference, Tokens, Totals
from fpocli.store import Store, fingerprint, index_dtype

GOLDEN = Path(__file__).parent / "golden" / "ref-1.0.zarr"
SITE = "layer_3.resid_post"
ABOUT = {"k": 5, "d_sae": 12, "value_dtype": "float32"}


def contents(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a store, read with plain zarr."""
    group = zarr.open_group(path, mode="r")
    return {
        name: np.asarray(item[:])
        for name, item in group.members(max_depth=None)
        if isinstance(item, zarr.Array)
    }


@pytest.fixture
def store(store_path, tmp_path) -> Path:
    """A copy that a test may spoil."""
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
    }
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items()} == expected
    assert arrays["spans"][-1, 3] == tokens
    about = zarr.open_group(store_path, mode="r").attrs["fpo"]
    assert about["format"] == "fpo-store"
    assert (about["version"], about["state"]) == ("1.0", "complete")
    assert set(about) == {
        *("format", "version", "state", "created", "writer", "pairs", "data", "tokenizer"),
        *("limits", "model", "sites", "block", "fingerprint"),
    }
    assert about["fingerprint"] == fingerprint(
        {k: v for k, v in about.items() if k not in ("format", "version", "state", "created",
                                                     "fingerprint")}
    )  # fmt: skip


def test_rows_keep_the_rules_of_the_format(store_path):
    arrays = contents(store_path)
    index, value = arrays[f"features/{SITE}/index"], arrays[f"features/{SITE}/value"]
    used = value > 0
    assert (np.diff(value, axis=-1) <= 0).all()
    assert (index[~used] == 65_535).all() and (value[~used] == 0).all()
    assert (index[used] < 96).all()
    nonzero = arrays[f"features/{SITE}/nonzero"]
    assert (used.sum(-1) == np.minimum(nonzero, 64)).all()
    assert (nonzero < 64).any(), "a row with unused slots is among them"
    counts = np.diff(arrays["spans"][:, 1:])
    average = arrays["ref/logp"] / counts
    assert np.allclose(arrays["ref/margin"], average[:, 0] - average[:, 1], atol=1e-6)


@pytest.mark.parametrize(("m", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_the_sentinel_stays_free(m, dtype):
    assert index_dtype(m) == dtype


def test_every_chunk_is_checked_and_belongs_to_one_block(store_path):
    """One flipped byte in any chunk file is an error that names array and block."""
    for file in sorted(store_path.rglob("*")):
        if not file.is_file() or file.name == "zarr.json":
            continue
        good = file.read_bytes()
        spoiled = bytearray(good)
        spoiled[len(good) // 2] ^= 1
        file.write_bytes(spoiled)
        name = str(file.relative_to(store_path)).split("/c/")[0]
        try:
            with pytest.raises(UserError, match="damaged") as caught:
                read_all(Store.open(store_path))
            assert name in str(caught.value)
        finally:
            file.write_bytes(good)
    read_all(Store.open(store_path))


def read_all(store: Store) -> None:
    assert store.missing_blocks() == []
    for block in range(store.blocks):
        store.reference(block, store.tokens(block))
    for site in store.sites:
        store.mean(site)
        store.frequency(site)


@pytest.mark.parametrize(
    "array", ["ref/logp", f"features/{SITE}/index", f"features/{SITE}/nonzero"]
)
def test_a_missing_chunk_is_no_value(store, array):
    min(file for file in (store / array / "c").rglob("*") if file.is_file()).unlink()
    with pytest.raises(UserError, match="block 0"):
        read_all(Store.open(store))


def test_chunks_of_two_blocks_cannot_be_swapped(store):
    """Each is whole and its checksum right; the block's own digest tells."""
    one, other = (store / "ref" / "logp" / "c" / block / "0" for block in "01")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(UserError, match=r"block 0.*not what was written"):
        read_all(Store.open(store))


def change(path: Path, **fields) -> None:
    group = zarr.open_group(path, mode="r+")
    group.attrs["fpo"] = group.attrs["fpo"] | fields


def test_only_a_complete_store_of_this_version_is_used(store):
    change(store, version="1.7")
    Store.open(store).require_complete()
    change(store, version="2.0")
    with pytest.raises(UserError, match=r"version 2\.0"):
        Store.open(store)
    change(store, version="1.0", state="partial")
    with pytest.raises(UserError, match="3 of 3 blocks"):
        Store.open(store).require_complete()


def test_a_missing_or_wrong_array_is_refused(store):
    shutil.rmtree(store / "ref" / "margin")
    with pytest.raises(UserError, match="lacks the array ref/margin"):
        Store.open(store)
    zarr.open_group(store, mode="r+").create_array("ref/margin", shape=(21,), dtype="float64")
    with pytest.raises(UserError, match=r"ref/margin of .* is float64"):
        Store.open(store)


def test_remove_deletes_stores_alone(store, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not an fpo store"):
        Store.remove(precious)
    assert (precious / "thesis.txt").exists()
    zarr.create_group(tmp_path / "other.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="r+").create_array("x", shape=(1,), dtype="i4")
    with pytest.raises(UserError, match="not an fpo store"):
        Store.remove(tmp_path / "other.zarr")
    Store.remove(store)
    assert not store.exists()


# -- writing in any order ----------------------------------------------------------------------

M, K = ABOUT["d_sae"], ABOUT["k"]


def made_up(pairs: int, seed: int) -> tuple[Tokens, list]:
    """Token runs and, for every pair, reference rows and pooled vectors."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, (pairs, 3))
    ends = lengths.cumsum().reshape(-1, 3)
    spans = np.column_stack([np.concatenate([[0], ends[:-1, 2]]), ends])
    tokens = Tokens(
        rng.integers(0, 9, lengths.sum()).astype(np.uint32), spans, np.arange(pairs) * 2
    )
    return tokens, [rng.random((2, M)) for _ in range(pairs)]


def rows_of(vectors: list, rows: slice) -> tuple[Reference, dict[str, Totals]]:
    pooled = np.stack(vectors[rows]).astype(np.float32)
    index = np.argsort(-pooled, axis=-1, kind="stable")[..., :K]
    features = Features(
        index.astype(np.uint16),
        np.take_along_axis(pooled, index, -1),
        (pooled > 0).sum(-1).astype(np.int32),
    )
    totals = Totals(pooled.sum((0, 1), dtype=np.float64), (pooled > 0).sum(0))
    logp = pooled[..., 0].copy()
    return Reference(logp, logp[:, 0] - logp[:, 1], {SITE: features}), {SITE: totals}


@settings(max_examples=12)
@given(st.integers(1, 17), st.integers(1, 6), st.randoms(use_true_random=False))
def test_content_does_not_depend_on_order_or_interruption(tmp_path_factory, pairs, block, rng):
    tokens, vectors = made_up(pairs, 1)
    meta = {
        "block": block,
        "pairs": {"kept": pairs},
        "sites": {SITE: ABOUT},
        "writer": {},
    }
    results = []
    for shuffled in (False, True):
        path = tmp_path_factory.mktemp("store") / "s.zarr"
        store = Store.create(path, meta, tokens)
        assert Store.open(path).meta["state"] == "tokenised"
        order = list(range(store.blocks))
        if shuffled:
            rng.shuffle(order)
        for number in order:
            if shuffled:  # every block by a writer of its own
                store = Store.open(path, writable=True)
            store.write_block(number, *rows_of(vectors, store.rows(number)))
            assert number not in store.missing_blocks()
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


def test_gaps_are_not_numbers(tmp_path):
    tokens, _ = made_up(5, 2)
    meta = {
        "block": 2,
        "pairs": {"kept": 5},
        "sites": {SITE: ABOUT},
        "writer": {},
    }
    Store.create(tmp_path / "s.zarr", meta, tokens)
    arrays = contents(tmp_path / "s.zarr")
    for name in ("ref/logp", "ref/margin", f"features/{SITE}/value", f"features/{SITE}/mean"):
        assert np.isnan(arrays[name]).all()
    assert Store.open(tmp_path / "s.zarr").missing_blocks() == [0, 1, 2]


# -- golden --------------------------------------------------------------------------------------


def test_the_golden_store_reads_as_it_did():
    """Written by version 1.0 and committed; every later version must read it to the bit."""
    expected = json.loads((GOLDEN.parent / "ref-1.0.json").read_text())
    store = Store.open(GOLDEN)
    store.require_complete()
    read_all(store)
    arrays = contents(GOLDEN)
    assert sorted(arrays) == sorted(expected["arrays"])
    for name, values in expected["arrays"].items():
        actual = arrays[name]
        assert str(actual.dtype) == values["dtype"]
        np.testing.assert_array_equal(
            actual, np.array(values["data"], values["dtype"]).reshape(values["shape"])
        )
    assert store.meta == expected["fpo"]
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    assert size < 200_000
