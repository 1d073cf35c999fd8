"""Next-token distributions in a store: where rows are, what is read back, and its checks.

Shapes: N pairs, R rows, n tokens.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import attributes_of, made_up, rows_of
from stores import attributes, contents, set_attributes

from fpocli.data.top_tokens import TopTokens
from fpocli.model.coarse_kl import coarse_kl, top_tokens
from fpocli.store import distribution_rows
from fpocli.store.distribution_rows import Distributions, largest_block, lay_out
from fpocli.store.missing import missing_distributions
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.schema import array_bytes
from fpocli.store.verify import find_damage
from fpocli.store.writer import StoreWriter
from fpocli.system.errors import UserError

V = 40


@pytest.fixture
def small_files(monkeypatch):
    """Several chunks make up a file, and several files a block."""
    monkeypatch.setattr(distribution_rows, "_CHUNK_BYTES", 2**6)
    monkeypatch.setattr(distribution_rows, "_SHARD_BYTES", 2**8)


def about(n: int = 5, dtype: str = "float32") -> dict:
    return {"distributions": {"n": n, "dtype": dtype, "vocabulary": V}}


def distributions(rows: int, n: int, rng: np.random.Generator) -> TopTokens[np.ndarray]:
    """The n likeliest of V tokens under random distributions, some of them with nearly all the
    mass at one token."""
    logits = rng.normal(0, rng.uniform(0.1, 9, (rows, 1)), (rows, V))
    whole = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    if n == V:
        return TopTokens(None, whole.astype(np.float32), np.full(rows, -np.inf, np.float32))
    ids = np.argsort(-whole)
    values = np.take_along_axis(whole, ids, 1)
    rest = np.log(np.exp(values[:, n:]).sum(1))
    return TopTokens(
        ids[:, :n].astype(np.uint32), values[:, :n].astype(np.float32), rest.astype(np.float32)
    )


def make(path, pairs: int, block: int, n: int = 5, dtype: str = "float32", missing=()):
    """A complete store, and the distributions of each pair as they were given."""
    tokens, _ = made_up(pairs, 1)
    rng = np.random.default_rng(2)
    given = [distributions(count, n, rng) for count in tokens.counts.sum(1).tolist()]
    return write(path, given, block, about(n, dtype), missing), given


def write(path, given: list[TopTokens[np.ndarray]], block: int, meta: dict, missing=()) -> Store:
    """A complete store with the distributions of each pair."""
    pairs = len(given)
    tokens, vectors = made_up(pairs, 1)
    store = StoreWriter.create(Folder(path), attributes_of(pairs, block) | meta, tokens)
    for number in range(store.blocks):
        rows = store.pairs_in(number)
        reference, totals = rows_of(vectors, rows)
        reference.margin[np.isin(np.arange(pairs)[rows], missing)] = np.nan
        top = missing_distributions(store.meta, tokens.counts[rows].sum())
        for into, *values in zip(top, *given[rows], strict=True):
            if into is not None:
                into[:] = np.concatenate(values)
        store.write_block(number, reference, totals, top)
    store.finish()
    return Store.open(path)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.sampled_from(["float32", "float16"]),
    st.integers(4, 12),
    st.integers(0, 5),
)
def test_no_file_has_rows_of_two_blocks(lengths, block, n, dtype, chunk_bits, shard_bits):
    counts = np.array(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution_rows, "_CHUNK_BYTES", 2**chunk_bits)
        patch.setattr(distribution_rows, "_SHARD_BYTES", 2 ** (chunk_bits + shard_bits))
        sizes, rows = lay_out(counts, block, Distributions(n, dtype, 50))
    np.testing.assert_array_equal(np.diff(rows), counts)
    owners: dict[int, int] = {}
    for pair, (begin, _, end) in enumerate(rows.tolist()):
        assert pair % block == 0 or begin == rows[pair - 1, 2]
        assert pair % block or begin % sizes["shard"] == 0
        for row in range(begin, end):
            assert owners.setdefault(row // sizes["shard"], pair // block) == pair // block
    assert sorted(owners) == list(range(sizes["padded"] // sizes["shard"])), "no file is empty"
    assert sizes["scored"] == counts.sum() and sizes["padded"] % sizes["shard"] == 0
    row = n * np.dtype(dtype).itemsize
    assert sizes["chunk"] == 1 or sizes["chunk"] * row <= 2**chunk_bits
    assert sizes["shard"] == 1 or sizes["shard"] * row <= max(2 ** (chunk_bits + shard_bits), row)
    assert sizes["shard"] % sizes["chunk"] == 0


@pytest.mark.parametrize(("n", "dtype"), [(1, "float32"), (5, "float32"), (V, "float32"),
                                          (5, "float16"), (V, "float16")])  # fmt: skip
def test_pairs_are_read_in_any_order(tmp_path, small_files, n, dtype):
    """As they were given, to the bit in float32; in float16 within its rounding, and normalised."""
    store, given = make(tmp_path / "s.zarr", 13, 4, n, dtype)
    rows = store.meta["distribution_rows"]
    assert rows["shard"] > rows["chunk"] or rows["padded"] > store.blocks * rows["shard"]
    assert store.distributions == Distributions(n, dtype, V)
    assert find_damage(store) == []
    for pairs in (range(13), [12, 0, 7, 7, 3], np.array([5])):
        top = store.top_tokens(pairs)
        expected = [np.concatenate(parts) for parts in zip(*(given[i][1:] for i in pairs))]  # noqa: B905
        assert top.logp.dtype == top.rest.dtype == np.float32
        if n == V:
            assert top.ids is None and np.isneginf(top.rest).all()
        else:
            np.testing.assert_array_equal(top.ids, np.concatenate([given[i].ids for i in pairs]))
            assert top.ids.dtype == np.uint32
        if dtype == "float32":
            np.testing.assert_array_equal(top.logp, expected[0])
            np.testing.assert_array_equal(top.rest, expected[1])
        else:
            # Half a unit of the last of 11 bits, twice: the value's own, and the sum's.
            np.testing.assert_allclose(top.logp, expected[0], rtol=2**-11, atol=2**-11)
            mass = np.exp(top.logp.astype(np.float64)).sum(1) + np.exp(top.rest)
            np.testing.assert_allclose(mass, 1, atol=1e-6)


def test_float16_has_the_error_that_is_stated(tmp_path):
    """In docs/format.md; over peaked and flat distributions of a usual vocabulary's size."""
    torch.manual_seed(0)
    sizes, v = made_up(12, 1)[0].counts.sum(1), 49_152
    m = int(sizes.sum())
    zipf = -torch.log(torch.arange(1, v + 1).float()) * torch.linspace(0.6, 3, m)[:, None]
    logits, targets = zipf + 1.5 * torch.randn(m, v), torch.zeros(m, dtype=torch.long)
    _, top = top_tokens(logits, targets, 64)
    ends = sizes.cumsum()
    given = [
        TopTokens(*(part[end - size : end].numpy() for part in top))
        for size, end in zip(sizes, ends, strict=True)
    ]
    meta = {"distributions": {"n": 64, "dtype": "float16", "vocabulary": v}}
    read = write(tmp_path / "s.zarr", given, 5, meta).top_tokens(range(12))
    error = np.abs(read.logp - top.logp.numpy())
    assert 1e-4 < error.mean() < 0.002 and error.max() < 0.008
    half = TopTokens(top.ids, torch.from_numpy(read.logp), torch.from_numpy(read.rest))
    moved = logits + torch.randn(m, v)
    for policy, mean, most in ((logits, 1e-5, 1e-4), (moved, 1e-4, 1e-3)):
        exact, rounded = (coarse_kl(policy, targets, known)[1] for known in (top, half))
        difference = (exact - rounded).abs()
        assert 0 < difference.mean() < mean and difference.max() < most


def test_rows_are_where_the_format_says(tmp_path, small_files):
    """Read with plain zarr: pair by pair, and what is between the blocks is the fill value."""
    store, given = make(tmp_path / "s.zarr", 13, 4)
    arrays = contents(store.path)
    rows, counts = arrays["ref/top/rows"], np.diff(arrays["spans"][:, 1:])
    np.testing.assert_array_equal(np.diff(rows), counts)
    used = np.zeros(len(arrays["ref/top/rest"]), bool)
    for pair, (begin, _, end) in enumerate(rows):
        np.testing.assert_array_equal(arrays["ref/top/ids"][begin:end], given[pair].ids)
        np.testing.assert_array_equal(arrays["ref/top/logp"][begin:end], given[pair].logp)
        used[begin:end] = True
    assert used.sum() == counts.sum() == store.meta["distribution_rows"]["scored"]
    assert len(used) == store.meta["distribution_rows"]["padded"]
    assert np.isnan(arrays["ref/top/logp"][~used]).all() and not arrays["ref/top/ids"][~used].any()
    sizes = array_bytes(store.meta)
    assert sizes["ref/top/ids"] == 4 * 5 * counts.sum(), "without padding"
    assert store.sizes()["ref/top/ids"][0] == sizes["ref/top/ids"]


def test_the_programs_of_the_format_read_it(tmp_path, small_files, monkeypatch, capsys):
    """Both of docs/format.md, run as they are printed there."""
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    digests, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(digests, names := {})
    for n in (5, V):
        path = tmp_path / "ref.zarr"
        store, given = make(path, 13, 4, n, missing=[2])
        group = zarr.open_group(path, mode="r")
        for block in range(store.blocks):
            assert names["block_digest"](group, block) == group["blocks/digest"][block]
        for pair in {*range(13)} - {2}:
            assert names["pair_digest"](group, pair) == group["ref/top/digest"][pair]
        exec(example, shown := {})
        length = shown["rejected"] - shown["start"]
        np.testing.assert_array_equal(
            shown["g"]["ref/top/logp"][shown["start"] : shown["rejected"]], given[4].logp[:length]
        )
        assert "predict the chosen tokens" in capsys.readouterr().out
        shutil.rmtree(path)


def test_a_pair_of_another_pair_or_store_is_not_read(tmp_path, small_files):
    """The arrays are complete and every checksum is right, but not the content."""
    path = tmp_path / "s.zarr"
    store, _ = make(path, 12, 4)
    other, _ = make(tmp_path / "other.zarr", 12, 4, dtype="float16")
    assert store.meta["fingerprint"] != other.meta["fingerprint"]
    shutil.copy(other.path / "ref/top/digest/c/0", path / "ref/top/digest/c/0")
    with pytest.raises(UserError, match=r"ref/top/digest, block 0 .* pair 2 does not match"):
        Store.open(path).top_tokens([5, 2])
    assert "ref/top/digest, block 0" in find_damage(Store.open(path))[0].message
    Store.open(path).top_tokens([5])
    # All blocks have as many rows in a file.
    shutil.copy(path / "ref/top/rest/c/1", path / "ref/top/rest/c/0")
    with pytest.raises(UserError, match="is damaged"):
        Store.open(path).top_tokens([0])


def test_a_missing_file_is_no_value(tmp_path, small_files):
    path = tmp_path / "s.zarr"
    store, _ = make(path, 9, 4)
    files = sorted((path / "ref/top/logp/c").glob("*/0"))
    assert len(files) > store.blocks
    last = store.read_array("ref/top/rows")[-1, 0] // store.meta["distribution_rows"]["shard"]
    (path / f"ref/top/logp/c/{last}/0").unlink()
    with pytest.raises(UserError, match=f"ref/top/logp, block 2 .* chunk {last} is missing"):
        store.top_tokens([8])
    (path / "ref/top/digest/c/1").unlink()
    with pytest.raises(UserError, match=r"ref/top/digest, block 1 .* chunk 1 is missing"):
        Store.open(path).top_tokens([4])
    assert {damage.block for damage in find_damage(Store.open(path))} == {1, 2}


def test_pairs_without_reference_values_have_no_distributions(tmp_path, small_files):
    path = tmp_path / "s.zarr"
    store, given = make(path, 9, 4, missing=[2, 8])
    assert store.non_finite == [2, 8] and find_damage(store) == []
    assert np.flatnonzero(contents(path)["ref/top/digest"] == 0).tolist() == [2, 8]
    for pair in (2, 8):
        with pytest.raises(UserError, match=f"pair {pair} of .* has no reference values"):
            store.top_tokens([pair])
    expected = [given[pair].rest for pair in (0, 1, 3)]
    np.testing.assert_array_equal(store.rest(0), np.concatenate(expected))
    assert len(store.rest(2)) == 0


def test_unscored_blocks_and_other_stores_have_none(tmp_path, store_path):
    with pytest.raises(UserError, match="has no distributions"):
        Store.open(store_path).top_tokens([0])
    assert Store.open(store_path).distributions is None
    tokens, _ = made_up(5, 2)
    path = tmp_path / "s.zarr"
    StoreWriter.create(Folder(path), attributes_of(5, 2) | about(), tokens)
    with pytest.raises(UserError, match=r"pair 3 of .* has no reference values"):
        Store.open(path).top_tokens([3])
    assert find_damage(Store.open(path)) == []


def test_a_block_that_takes_too_much_memory(monkeypatch):
    counts = np.array([[3, 4], [10, 10], [1, 1], [2, 2], [5, 9]])
    kind = Distributions(6, "float32", V)
    assert kind.row_bytes == 6 * 8 + 4 and Distributions(V, "float16", V).row_bytes == 2 * V + 2
    for limit, expected in ((47, 8), (46, 4), (32, 2), (27, 2), (26, 1), (20, 1), (19, 0)):
        monkeypatch.setattr(distribution_rows, "LARGEST_BLOCK", limit * kind.row_bytes)
        assert largest_block(counts, 8, kind) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distributions": None}, "distributions is missing or of the wrong type"),
        ({"distributions": {"n": 5, "dtype": "float32"}}, r"distributions\.vocabulary is missing"),
        (about(V + 1), "distributions of 41 of 40 tokens cannot be"),
        (about(0), "distributions of 0 of 40"),
        (about(5, "float64"), "the dtype float64 is unknown"),
        ({"distribution_rows": {"chunk": 0}}, "do not match the pairs"),
        ({"distribution_rows": {"chunk": True}}, "chunk is missing or of the wrong type"),
        ({"distribution_rows": {"shard": 0}}, "do not match the pairs"),
        ({"distribution_rows": {"scored": 2**50}}, "do not match the pairs"),
        ({"distribution_rows": {"padded": 2**50}}, "do not match the pairs"),
        ({"distribution_rows": {"padded": 2**40, "shard": 2**40, "chunk": 2**40}}, "2 GiB"),
        (about(4), "expected uint32"),
    ],
)
def test_invalid_attributes_are_refused(tmp_path, change, message):
    path = tmp_path / "s.zarr"
    make(path, 5, 2)
    if rows := change.get("distribution_rows"):
        change = {"distribution_rows": attributes(path)["distribution_rows"] | rows}
    set_attributes(path, **change)
    with pytest.raises(UserError, match=message):
        Store.open(path)


def test_rows_that_take_more_memory_than_a_block_may_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    store, _ = make(path, 5, 2)
    monkeypatch.setattr("fpocli.store.distribution_reader.LARGEST_BLOCK", 200)
    with pytest.raises(UserError, match=r"ref/top/rows, block 1 .* do not describe rows"):
        store.top_tokens([2])
