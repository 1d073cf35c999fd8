"""The arrays of an open store. Every chunk that is read must exist, and its checksum must match.

Shapes: N pairs, B blocks, b pairs of one block.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from fpocli.store.metadata import REPAIR
from fpocli.store.schema import array_schema, kept_features
from fpocli.system.errors import UserError

# What zarr raises for a damaged chunk.
BROKEN = (ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError)


class ArrayReader:
    """Reads arrays by blocks of pairs.

    Args:
        path: of the store.
        meta: its attributes, checked.
    """

    _mode: Literal["r", "r+"] = "r"

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self._group: Any = zarr.open_group(path, mode=self._mode, zarr_format=3)
        self._arrays: dict[str, Any] = {}
        self._done: set[int] = set()
        self.block_size: int = meta["block"]
        self.pairs: int = meta["pairs"]["kept"]
        self.sites: dict[str, dict[str, Any]] = meta["sites"]

    @property
    def widths(self) -> dict[str, int]:
        """m of each site."""
        return {site: about["d_sae"] for site, about in self.sites.items()}

    @property
    def has_kept(self) -> bool:
        """Whether some site has features that are stored for every response."""
        return any(map(kept_features, self.sites.values()))

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

    def read_array(self, name: str) -> np.ndarray:
        """A whole array, such as spans or ref/margin; blocks not scored yet hold the fill value."""
        if self.meta["state"] == "complete" or name in ("tokens", "spans", "source_row"):
            array = self.array(name)
            for chunk in range(-(-array.shape[0] // _file_rows(array))):
                self._require_chunk(name, chunk, chunk if name != "tokens" else None)
        return self.read_rows(name, slice(None))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of each array: in memory and on disk."""
        arrays = {name: self.array(name) for name in array_schema(self.meta) if name in self._group}
        return {
            name: (array.nbytes, array.nbytes_stored()) for name, array in sorted(arrays.items())
        }

    def array(self, name: str) -> Any:
        # Cached: zarr reads an array's metadata again whenever it is looked up.
        if name not in self._arrays:
            # Chunks equal to the fill value are written as well: a missing file then always means
            # missing values.
            self._arrays[name] = self._group[name].with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def read_rows(self, name: str, rows: slice, block: int | None = None) -> np.ndarray:
        """A part of an array; if a block is named, its chunks must exist."""
        array = self.array(name)
        if block is not None:
            first, last, _ = rows.indices(array.shape[0])
            size = _file_rows(array)
            for chunk in range(first // size, -(-last // size)):
                self._require_chunk(name, chunk, block)
        try:
            return np.asarray(array[rows])
        except BROKEN as error:
            raise self.damaged(name, block, str(error)) from error

    def _require_chunk(self, name: str, chunk: int, block: int | None) -> None:
        """Refuse a missing chunk, for which zarr would silently return the fill value."""
        if not self._is_there(name, chunk):
            raise self.damaged(name, block, f"chunk {chunk} is missing")

    def _is_there(self, name: str, chunk: int) -> bool:
        array = self.array(name)
        key = array.metadata.encode_chunk_key((chunk, *[0] * (array.ndim - 1)))
        return (self.path / name / key).is_file()

    def damaged(self, name: str, block: int | None, why: str) -> UserError:
        rows = self.pairs_in(block) if block is not None else None
        where = f", block {block} (pairs {rows.start} to {rows.stop - 1})," if rows else ""
        return UserError(f"the array {name}{where} of {self.path} is damaged: {why}", REPAIR)


def _file_rows(array: Any) -> int:
    """Rows of a file of an array: of a shard, which consists of chunks, or of a chunk."""
    return (array.shards or array.chunks)[0]
