"""The arrays of an open store. Every chunk that is read must exist, and its checksum must match.

Shapes: N pairs, B blocks, b pairs of one block.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from fpocli.store.digest import hash_of_sources
from fpocli.store.metadata import REPAIR, attributes
from fpocli.store.place import Place
from fpocli.store.schema import array_bytes, kept_features
from fpocli.system.errors import UserError

# What is known before a block is scored.
_OF_TOKENS = ("tokens", "spans", "source_row", "source")
# What zarr raises for a damaged chunk.
BROKEN = (
    ArithmeticError, ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError,
)  # fmt: skip


class ArrayReader:
    """Reads arrays by blocks of pairs, and knows which blocks are scored.

    Args:
        place: of the store.
        meta: its attributes, checked.
    """

    _mode: Literal["r", "r+"] = "r"

    def __init__(self, place: Place, meta: dict[str, Any]) -> None:
        self.place, self.meta = place, meta
        there = place.for_zarr()
        self._group: Any = self._repeat(
            lambda: zarr.open_group(there, mode=self._mode, zarr_format=3)
        )
        self._arrays: dict[str, Any] = {}
        self._done: set[int] = set()
        self.block_size: int = meta["block"]
        self.pairs: int = meta["pairs"]["kept"]
        self.sites: dict[str, dict[str, Any]] = meta["sites"]

    @property
    def path(self) -> Path | str:
        """Where the store is, as it was typed."""
        return self.place.name

    @property
    def widths(self) -> dict[str, int]:
        """m of each site."""
        return {site: about["d_sae"] for site, about in self.sites.items()}

    @property
    def has_kept(self) -> bool:
        """Whether some site has features that are stored for every response."""
        return any(map(kept_features, self.sites.values()))

    @property
    def is_mixture(self) -> bool:
        """Whether the pairs are from several sources."""
        return "sources" in self.meta["pairs"]

    @property
    def imported(self) -> dict[str, str] | None:
        """Where the reference's log-probabilities come from that fpo did not compute: source,
        fingerprint and reduction; None if it did."""
        return self.meta["model"].get("imported")

    @property
    def in_4bit(self) -> bool:
        """Whether the linear layers of the reference were held in 4 bits."""
        return "quantization" in self.meta["model"]

    @property
    def blocks(self) -> int:
        """B, the number of blocks."""
        return -(-self.pairs // self.block_size)

    def pairs_in(self, block: int) -> slice:
        """The pairs of a block."""
        return slice(block * self.block_size, min((block + 1) * self.block_size, self.pairs))

    def block_length(self, block: int) -> int:
        """b, the number of pairs in a block."""
        rows = self.pairs_in(block)
        return rows.stop - rows.start

    @property
    def non_finite(self) -> list[int]:
        """The pairs without reference values because they were non-finite; sorted."""
        return self.meta["pairs"].get("not_finite", [])

    def is_scored(self, block: int) -> bool:
        """Whether a block has its digest, and so its reference values."""
        # A digest is never removed while others write, and this is called often.
        if block not in self._done:
            own = slice(block, block + 1)
            if not self._read("blocks/digest", own, block, required=False)[0]:
                return False
            self._done.add(block)
        return True

    def check_not_replaced(self) -> dict[str, Any]:
        """Refuse to go on if the folder holds another store by now.

        Returns:
            its current attributes.

        Raises:
            UserError: the store was replaced or removed since it was opened.
        """
        about = attributes(self.place)
        if about.get("fingerprint") != self.meta["fingerprint"]:
            raise UserError(
                f"{self.path} was replaced or removed in the meantime", "run the command again"
            )
        return about

    def read_array(self, name: str) -> np.ndarray:
        """A whole array, such as spans or ref/margin; blocks not scored yet hold the fill value."""
        values = self._read(name, slice(None))
        if self.meta["state"] == "complete" or name in _OF_TOKENS:
            for file in _perhaps_missing(self._array(name), 0, values):
                self._require_file(name, file, file if name != "tokens" else None)
        return values

    def sources(self) -> np.ndarray:
        """Which source of the mixture each pair is from: uint16 [N]; zeros without a mixture.

        Raises:
            UserError: the array does not match its hash.
        """
        if not self.is_mixture:
            return np.zeros(self.pairs, np.uint16)
        values = self.read_array("source")
        about = self.meta["pairs"]["sources"]
        if hash_of_sources(values) != about["hash"]:
            raise self._damaged("source", None, "it does not match its hash")
        if np.bincount(values, minlength=len(about["kept"])).tolist() != about["kept"]:
            raise self._damaged("source", None, "it does not match pairs.sources")
        return values

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of each array: in memory and on disk."""
        return {
            name: (raw, self._array(name).nbytes_stored())
            for name, raw in sorted(array_bytes(self.meta).items())
            if self.place.exists(f"{name}/zarr.json")
        }

    def _array(self, name: str) -> Any:
        # Cached: zarr reads an array's metadata again whenever it is looked up.
        if name not in self._arrays:
            # Chunks equal to the fill value are written as well: a missing file then always means
            # missing values.
            array = self._repeat(lambda: self._group[name])
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _read(
        self, name: str, rows: slice, block: int | None = None, *, required: bool = True
    ) -> np.ndarray:
        """A part of an array; if a block is named and it is required, its files must exist."""
        array = self._array(name)
        try:
            values = np.asarray(self._repeat(lambda: array[rows]))
        except BROKEN as error:
            raise self._damaged(name, block, str(error)) from error
        if block is not None and required:
            for file in _perhaps_missing(array, rows.start, values):
                self._require_file(name, file, block)
        return values

    def _read_together(self, parts: dict[str, slice], block: int) -> dict[str, np.ndarray]:
        """Parts of several arrays, by name; their files must exist."""
        reads = [partial(self._read, name, rows, block) for name, rows in parts.items()]
        return dict(zip(parts, self.place.together(reads), strict=True))

    def _repeat(self, read: Callable[[], Any]) -> Any:
        """What is read, again where what came is damaged and the place may be to blame."""
        for _ in range(self.place.attempts - 1):
            with suppress(*BROKEN):
                return read()
        return read()

    def _require_file(self, name: str, file: int, block: int | None) -> None:
        """Refuse a missing chunk or shard, for which zarr would silently return the fill value."""
        if not self.place.exists(self._key(name, file)):
            raise self._damaged(name, block, f"chunk {file} is missing")

    def _key(self, name: str, file: int) -> str:
        """Of a chunk or shard, by its number along the first axis."""
        array = self._array(name)
        key = array.metadata.encode_chunk_key((file, *[0] * (array.ndim - 1)))
        return f"{name}/{key}"

    def _damaged(self, name: str, block: int | None, why: str) -> UserError:
        rows = self.pairs_in(block) if block is not None else None
        where = f", block {block} (pairs {rows.start} to {rows.stop - 1})," if rows else ""
        return UserError(f"the array {name}{where} of {self.path} is damaged: {why}", REPAIR)


def _perhaps_missing(array: Any, start: int, values: np.ndarray) -> Iterator[int]:
    """The numbers of the chunks or shards that may be missing, as the last row that was read of
    them begins with the fill value. That of one that exists seldom does.

    Args:
        array: of zarr.
        start: the first row that was read.
        values: what was read.
    """
    length = (array.shards or array.chunks)[0]
    for file in range(start // length, -(-(start + len(values)) // length)):
        last = values[min((file + 1) * length - start, len(values)) - 1]
        if np.array_equal(last.flat[0], array.fill_value, equal_nan=True):
            yield file
