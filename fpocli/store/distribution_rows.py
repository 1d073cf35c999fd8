"""How a store lays out next-token distributions in rows. Reads and writes nothing.

A row is a scored position. The rows of a block follow pair by pair, those of the chosen response
before those of the rejected. Zarr compresses chunks of rows, so that a pair can be read without
its block, and puts many chunks into a file, a shard. Each block is padded to whole shards, so that
no file has rows of two blocks.

Shapes: N pairs, M scored positions, R rows with padding, n tokens, V vocabulary.
"""

import math
from typing import Any, NamedTuple, Self

import numpy as np

# Bytes of `logp` in a chunk and in a shard, before compression; at most, if a row is not larger.
_CHUNK_BYTES, _SHARD_BYTES = 2**18, 2**26
# A block is held in memory while it is scored.
LARGEST_BLOCK = 2**32


class Distributions(NamedTuple):
    """What a store holds of the reference's next-token distributions.

    Args:
        n: tokens of each, the likeliest.
        dtype: of the stored log-probabilities, float32 or float16.
        vocabulary: V; n = V is the whole distribution.
    """

    n: int
    dtype: str
    vocabulary: int

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Self | None:
        """What the attributes of a store say; None if it has no distributions."""
        about = meta.get("distributions")
        return cls(about["n"], about["dtype"], about["vocabulary"]) if about else None

    @property
    def whole(self) -> bool:
        """Whether the distributions are whole; token ids are then not stored."""
        return self.n == self.vocabulary

    @property
    def words(self) -> str:
        """Such as "the 64 likeliest next tokens"."""
        return "all next tokens" if self.whole else f"the {self.n:,} likeliest next tokens"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory, as stored."""
        item = np.dtype(self.dtype).itemsize
        return self.n * item + item + (0 if self.whole else 4 * self.n)


def lay_out(
    counts: np.ndarray, block: int, about: Distributions
) -> tuple[dict[str, int], np.ndarray]:
    """Decide where the rows of every pair are.

    Args:
        counts: int64 [N, 2], scored positions of chosen and rejected.
        block: pairs per block.
        about: decides how large a row is.

    Returns:
        the attribute `distribution_rows` of docs/format.md;
        int64 [N, 3], the first row of chosen and of rejected, and the end of the pair.
    """
    lengths = counts.sum(1)
    in_block = _rows_by_block(lengths, block)
    row, largest = about.n * np.dtype(about.dtype).itemsize, int(in_block.max())
    chunk = max(1, min(_CHUNK_BYTES // row, largest))
    chunks = math.ceil(largest / chunk)
    # Blocks too large for one shard are cut evenly.
    shards = math.ceil(chunks / max(1, _SHARD_BYTES // (chunk * row)))
    shard = chunk * math.ceil(chunks / shards)
    padded = -(-in_block // shard) * shard
    # Rows of padding before each pair.
    gaps = padded - in_block
    before = (gaps.cumsum() - gaps)[np.arange(len(lengths)) // block]
    begin = lengths.cumsum() - lengths + before
    sizes = {"scored": int(lengths.sum()), "padded": int(padded.sum())}
    rows = np.column_stack([begin, begin + counts[:, 0], begin + lengths])
    return sizes | {"chunk": chunk, "shard": shard}, rows


def largest_block(counts: np.ndarray, block: int, about: Distributions) -> int:
    """The pairs per block, `block` halved as often as needed, of which no block takes more than
    LARGEST_BLOCK in memory; 0 if a single pair does.

    Args:
        counts, block, about: as `lay_out` takes them.
    """
    most = LARGEST_BLOCK // about.row_bytes
    while block and _rows_by_block(counts.sum(1), block).max() > most:
        block //= 2
    return block


def _rows_by_block(lengths: np.ndarray, block: int) -> np.ndarray:
    return np.add.reduceat(lengths, np.arange(0, len(lengths), block))
