"""The reference's next-token distributions in a store, read pair by pair.

Shapes: b pairs of a block, M scored positions, n tokens.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fpocli.data.top_tokens import TopTokens
from fpocli.store.array_reader import ArrayReader
from fpocli.store.digest import digest_of_distributions
from fpocli.store.distribution_rows import LARGEST_BLOCK, Distributions
from fpocli.store.place import Place
from fpocli.system.errors import UserError

# Blocks of which it is remembered where the rows of their pairs are.
_REMEMBERED = 64


class DistributionReader(ArrayReader):
    """Reads distributions; see `top_tokens`."""

    def __init__(self, place: Place, meta: dict[str, Any]) -> None:
        super().__init__(place, meta)
        self.distributions = Distributions.of(meta)
        self._remembered = lru_cache(_REMEMBERED)(self._places_and_digests)

    def top_tokens(self, pairs: Sequence[int]) -> TopTokens[np.ndarray]:
        """The distributions at all scored positions of some pairs, in their order: of each pair
        those of the chosen response, then of the rejected.

        Args:
            pairs: their numbers, at least one.

        Returns:
            ids uint32 or None, log-probabilities float32, normalised. In a store of float32 they
            are as the reference gave them; in one of float16 they are rounded, and normalised
            after that.

        Raises:
            UserError: the store or a pair has none, or a pair does not match its digest.
        """
        if self.distributions is None:
            raise UserError(
                f"{self.path} has no distributions", "cache again with --distributions 64"
            )
        found = [divmod(int(pair), self.block_size) for pair in pairs]
        known = self._known({block for block, _ in found})
        for pair, (block, row) in zip(pairs, found, strict=True):
            if block not in known or not known[block][1][row]:
                raise UserError(f"pair {pair} of {self.path} has no reference values")
        parts = self._read_rows([(block, *known[block][0][row, ::2]) for block, row in found])
        for (block, row), top in zip(found, parts, strict=True):
            self._check(block, row, row + 1, *known[block], top)
        logp = np.concatenate([top.logp for top in parts])
        rest = np.concatenate([top.rest for top in parts])
        if self.distributions.dtype == "float16":
            logp, rest = _normalised(logp, rest)
        ids = [top.ids for top in parts if top.ids is not None]
        return TopTokens(np.concatenate(ids) if ids else None, logp, rest)

    def rest(self, block: int) -> np.ndarray:
        """Log-probability of all tokens that are not stored, at the scored positions of a block:
        [M], without those of pairs without reference values."""
        places, digests = self._places_and_digests(block)
        values = self._read("ref/top/rest", slice(places[0, 0], places[-1, 2]), block)
        return values[(digests > 0).repeat(places[:, 2] - places[:, 0])]

    def check_distributions(self, block: int, counts: np.ndarray, missing: np.ndarray) -> None:
        """Read all rows of a block.

        Args:
            block: which one; scored.
            counts: int64 [b, 2], scored positions of chosen and rejected.
            missing: bool [b], the pairs without reference values.

        Raises:
            UserError: a checksum or digest is wrong, or the rows are not those of the pairs.
        """
        places, digests = self._places_and_digests(block)
        if not np.array_equal(np.diff(places), counts):
            raise self._damaged("ref/top/rows", block, "they do not match the pairs")
        if not np.array_equal(digests == 0, missing):
            raise self._damaged("ref/top/digest", block, "missing values do not match ref/margin")
        for first, last in self._parts(places):
            (top,) = self._read_rows([(block, int(places[first, 0]), int(places[last - 1, 2]))])
            self._check(block, first, last, places, digests, top)
        # The padding, up to the end of a file.
        end, shard = int(places[-1, 2]), self._shard
        self._read_rows([(block, end, end + -end % shard)])

    @property
    def _shard(self) -> int:
        return self.meta["distribution_rows"]["shard"]

    def _parts(self, places: np.ndarray) -> Iterator[tuple[int, int]]:
        """Neighbouring pairs that take about as much memory as a shard."""
        first = 0
        while first < len(places):
            full = int(np.searchsorted(places[:, 2], places[first, 0] + self._shard, side="right"))
            last = max(first + 1, full)
            yield first, last
            first = last

    def _known(self, blocks: Collection[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The places and digests of those blocks that are scored."""

        def read(block: int) -> tuple[np.ndarray, np.ndarray] | None:
            return self._remembered(block) if self.is_scored(block) else None

        found = self.place.together([partial(read, block) for block in blocks])
        return {block: about for block, about in zip(blocks, found, strict=True) if about}

    def _places_and_digests(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a block's pairs: int64 [b, 3] and uint64 [b]."""
        digests = self._read("ref/top/digest", self.pairs_in(block), block)
        return self._places(block), digests

    def _places(self, block: int) -> np.ndarray:
        """Where the rows of a block's pairs are: int64 [b, 3], the first row of chosen and of
        rejected, and the end."""
        assert self.distributions is not None
        shard = self._shard
        places = self._read("ref/top/rows", self.pairs_in(block), block)
        begin, end = int(places[0, 0]), int(places[-1, 2])
        # Memory is allocated by them.
        if not (
            (np.diff(places) > 0).all()
            and (places[1:, 0] == places[:-1, 2]).all()
            and begin % shard == 0
            and 0 <= begin < end <= self.meta["distribution_rows"]["padded"]
            and (end - begin) * self.distributions.row_bytes <= LARGEST_BLOCK
        ):
            raise self._damaged("ref/top/rows", block, "they do not describe rows")
        return places

    def _check(
        self,
        block: int,
        first: int,
        last: int,
        places: np.ndarray,
        digests: np.ndarray,
        top: TopTokens[np.ndarray],
    ) -> None:
        """Refuse rows of neighbouring pairs of which one has reference values and does not match
        its digest.

        Args:
            block: of the pairs.
            first, last: the first one, counted from the block's, and the one after the last.
            places, digests: of the block.
            top: their rows, as they are stored.
        """
        begin = places[first, 0]
        for row in range(first, last):
            pair = self.pairs_in(block).start + row
            own = top.at(slice(places[row, 0] - begin, places[row, 2] - begin))
            made = digest_of_distributions(self.meta["fingerprint"], pair, own)
            if digests[row] not in (0, made):
                self.check_not_replaced()
                raise self._damaged("ref/top/digest", block, f"pair {pair} does not match it")

    def _read_rows(self, ranges: list[tuple[int, int, int]]) -> list[TopTokens[np.ndarray]]:
        """Rows as they are stored.

        Args:
            ranges: of each a block, its first row and the row after the last.
        """
        assert self.distributions is not None
        names = ("logp", "rest") if self.distributions.whole else ("ids", "logp", "rest")
        read = iter(
            self.place.together(
                [
                    partial(self._read, f"ref/top/{name}", slice(begin, end), block)
                    for block, begin, end in ranges
                    for name in names
                ]
            )
        )
        parts = ({name: next(read) for name in names} for _ in ranges)
        return [TopTokens(part.get("ids"), part["logp"], part["rest"]) for part in parts]


def _normalised(logp: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities whose rounded values do not sum to 1: [M, n] and [M], as float32."""
    logp, rest = logp.astype(np.float32), rest.astype(np.float32)
    # No value is above 0 by more than its rounding, so this cannot overflow.
    total = np.log(np.exp(logp).sum(-1, dtype=np.float64) + np.exp(rest)).astype(np.float32)
    logp -= total[:, None]
    return logp, rest - total
