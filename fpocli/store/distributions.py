"""The reference's next-token distributions in a store: where they are, read, written and checked.

Each scored position has one row. The rows of a block follow pair by pair, chosen before rejected,
and begin at a multiple of the shard, so no file holds rows of two blocks. A shard consists of small
chunks, which are read one by one: a process reads the pairs that it needs, and no more.

Shapes: N pairs, B blocks, M scored positions, n tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fpocli.data.top_tokens import TopTokens
from fpocli.store.array_reader import ArrayReader
from fpocli.store.digest import digest_of_distributions
from fpocli.store.records import TokenPairs
from fpocli.store.schema import row_bytes, rows_per_chunk
from fpocli.system.errors import UserError

# Most bytes of a shard, which is written whole, and of what a check reads at once.
_SHARD = 2**26
# Most bytes of a block's rows, which are in memory until they are written.
_BLOCK = 2**32


def plan_rows(about: dict[str, Any], block: int, counts: np.ndarray) -> tuple[dict[str, int], Any]:
    """How the rows are laid out.

    Args:
        about: the attribute `distributions`.
        block: pairs per block.
        counts: int64 [N, 2], scored positions of every response.

    Returns:
        the attribute `distribution_rows`; int64 [B], the first row of each block.

    Raises:
        UserError: a block is too large for memory.
    """
    scored = np.add.reduceat(counts.sum(1), np.arange(0, len(counts), block))
    largest, chunk = int(scored.max()), rows_per_chunk(about)
    if largest * row_bytes(about) > _BLOCK:
        fitting = max(1, int(block * _BLOCK / (largest * row_bytes(about))))
        raise UserError(
            f"the distributions of a block of {block} pairs would take "
            f"{largest * row_bytes(about) / 2**30:.1f} GiB of memory",
            f"use --block {fitting}, or fewer --distributions",
        )
    parts = -(-largest * row_bytes(about) // _SHARD)
    shard = -(-largest // (parts * chunk)) * chunk
    padded = -(-scored // shard) * shard
    rows = {"scored": int(scored.sum()), "rows": int(padded.sum()), "shard": shard}
    return rows, padded.cumsum() - padded


class StoredDistributions:
    """The distributions of a store.

    Args:
        reader: of the store.
    """

    def __init__(self, reader: ArrayReader) -> None:
        self._reader = reader
        about = reader.meta["distributions"]
        self.tokens: int = about["tokens"]
        self.vocabulary: int = about["vocabulary"]
        self.dtype: str = about["dtype"]
        # The last few blocks' small arrays.
        self._offsets = lru_cache(maxsize=16)(self._read_offsets)
        self._digests = lru_cache(maxsize=16)(self._read_digests)

    @property
    def whole(self) -> bool:
        """Whether they are of the whole vocabulary, and so exact."""
        return self.tokens == self.vocabulary

    def read(self, pairs: Sequence[int]) -> TopTokens[np.ndarray]:
        """The distributions at the scored positions of some pairs, one pair after the other.

        Args:
            pairs: their numbers in the store; they must have reference values.

        Returns:
            ids uint32, logp and rest float32; float16 records are renormalised.

        Raises:
            UserError: they are missing or damaged.
        """
        parts = [part for run in _runs(pairs, self._reader.block_size) for part in self._read(run)]
        ids = None if self.whole else np.concatenate([part.ids for part in parts])
        logp, rest = (
            np.concatenate([getattr(part, name) for part in parts], dtype=np.float32)
            for name in ("logp", "rest")
        )
        if self.dtype == "float16":
            total = np.logaddexp(np.logaddexp.reduce(logp, 1), rest)
            logp, rest = logp - total[:, None], rest - total
        return TopTokens(ids, logp, rest)

    def check(self, block: int, missing: np.ndarray) -> None:
        """Read a block and compare every pair with its digest.

        Args:
            block: which one.
            missing: the numbers of the pairs that have no reference values.

        Raises:
            UserError: rows are missing or damaged.
        """
        pairs = self._reader.pairs_in(block)
        there = np.setdiff1d(np.arange(pairs.start, pairs.stop), missing).tolist()
        ends = np.diff(self._offsets(block)) * row_bytes(self._reader.meta["distributions"])
        parts = ends.cumsum() // _SHARD
        for part in np.unique(parts):
            of_part = {pairs.start + int(row) for row in np.flatnonzero(parts == part)}
            for run in _runs([pair for pair in there if pair in of_part], self._reader.block_size):
                self._read(run)

    def missing_rows(self, tokens: TokenPairs) -> TopTokens[np.ndarray]:
        """Rows for all scored positions of a block, all missing, to be filled."""
        rows = int(tokens.counts.sum())
        ids = None if self.whole else np.zeros((rows, self.tokens), np.uint32)
        logp = np.full((rows, self.tokens), np.nan, self.dtype)
        return TopTokens(ids, logp, np.full(rows, np.nan, self.dtype))

    def write(self, block: int, tokens: TokenPairs, top: TopTokens[np.ndarray]) -> None:
        """Write the rows of a block, shard by shard, and the digest of each of its pairs."""
        start, shard = int(self._start[block]), self._reader.meta["distribution_rows"]["shard"]
        for name, values in top.arrays.items():
            array = self._reader.array(f"ref/top/{name}")
            for first in range(0, len(values), shard):
                piece = values[first : first + shard]
                padded = np.full((shard, *values.shape[1:]), array.fill_value, values.dtype)
                padded[: len(piece)] = piece
                array[start + first : start + first + shard] = padded
        pairs = self._reader.pairs_in(block)
        ends = tokens.counts.sum(1).cumsum()
        digests = np.zeros(len(tokens), np.uint64)
        for row, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            part = top.at(slice(first, last))
            if not np.isnan(part.rest).any():
                digests[row] = self._digest(pairs.start + row, part)
        self._reader.array("ref/top/digest")[pairs] = digests
        self._digests.cache_clear()

    def coverage(self) -> np.ndarray:
        """Mass of the n tokens at every scored position: float64 [M]."""
        if self.whole:
            return np.ones(self._reader.meta["distribution_rows"]["scored"])
        parts = []
        for block in range(self._reader.blocks):
            start, stop = self._start[block], self._start[block] + self._offsets(block)[-1]
            rest = self._reader.read_rows("ref/top/rest", slice(start, stop), block)
            parts.append(1 - np.exp(rest.astype(np.float64)))
        masses = np.concatenate(parts)
        return masses[np.isfinite(masses)]

    @cached_property
    def _start(self) -> np.ndarray:
        """The first row of each block: int64 [B]."""
        about = self._reader.meta["distribution_rows"]
        start = self._reader.read_rows("ref/top/start", slice(None), 0)
        ends = np.append(start[1:], about["rows"])
        if start[0] != 0 or (start % about["shard"]).any() or not (start < ends).all():
            raise self._reader.damaged("ref/top/start", None, "they are no first rows of blocks")
        return start

    def _read_offsets(self, block: int) -> np.ndarray:
        """Rows before each pair of a block, and of all of it: int64 [b + 1]."""
        spans = self._reader.read_rows("spans", self._reader.pairs_in(block), block)
        offsets = np.concatenate([[0], (spans[:, 3] - spans[:, 1]).cumsum()])
        room = np.append(self._start, self._reader.meta["distribution_rows"]["rows"])
        if not ((np.diff(offsets) > 0).all() and offsets[-1] <= room[block + 1] - room[block]):
            raise self._reader.damaged("spans", block, "they do not describe scored tokens")
        return offsets

    def _read_digests(self, block: int) -> np.ndarray:
        return self._reader.read_rows("ref/top/digest", self._reader.pairs_in(block), block)

    def _read(self, run: range) -> list[TopTokens[np.ndarray]]:
        """The rows of consecutive pairs of a block as they are stored, checked."""
        block, first = divmod(run.start, self._reader.block_size)
        offsets = self._offsets(block)[first : first + len(run) + 1]
        rows = slice(*(int(self._start[block] + end) for end in (offsets[0], offsets[-1])))
        ids, logp, rest = (
            None
            if name == "ids" and self.whole
            else self._reader.read_rows(f"ref/top/{name}", rows, block)
            for name in TopTokens._fields
        )
        top, parts = TopTokens(ids, logp, rest), []
        for pair, start, stop in zip(run, offsets[:-1], offsets[1:], strict=True):
            part = top.at(slice(int(start - offsets[0]), int(stop - offsets[0])))
            if self._digest(pair, part) != self._digests(block)[pair % self._reader.block_size]:
                raise self._reader.damaged(
                    "ref/top", block, f"the distributions of pair {pair} do not match their digest"
                )
            parts.append(part)
        return parts

    def _digest(self, pair: int, part: TopTokens[np.ndarray]) -> np.uint64:
        fingerprint = self._reader.meta["fingerprint"]
        return digest_of_distributions(fingerprint, pair, list(part.arrays.values()))


def _runs(pairs: Sequence[int], block_size: int) -> Iterator[range]:
    """Pairs, in their order, as ranges of consecutive ones of the same block."""
    begin = 0
    for place in range(1, len(pairs) + 1):
        follows = place < len(pairs) and pairs[place] == pairs[place - 1] + 1
        if not follows or pairs[place] % block_size == 0:
            yield range(pairs[begin], pairs[place - 1] + 1)
            begin = place
