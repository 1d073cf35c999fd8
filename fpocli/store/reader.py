"""The store of a frozen reference, version 1: docs/format.md in code, to be read.

layout.py says what it must look like, draft.py writes it.
Shapes: N pairs, T tokens, K kept features, m features of a site, B blocks, b pairs of one block.
"""

import os
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import zarr

from fpocli.features.top_features import TopFeatures
from fpocli.store.digest import digest_of_block, digest_of_totals
from fpocli.store.layout import FORMAT, VERSION, layout, wrong_attribute
from fpocli.store.metadata import (
    DOCUMENT,
    REPAIR,
    array_document,
    attributes,
    check_documents,
    is_begun,
    read_root,
)
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.system.errors import UserError

# In this order; anything else may hide damage.
_CODECS = ["bytes", "zstd", "crc32c"]
# What zarr raises where a chunk is not what it should be.
_BROKEN = (ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError)


class Store:
    """An open store, to be read. `open` gives one."""

    _mode: Literal["r", "r+"] = "r"

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self._group: Any = zarr.open_group(path, mode=self._mode, zarr_format=3)
        self._arrays: dict[str, Any] = {}
        self._done: set[int] = set()
        self.block_size: int = meta["block"]
        self.pairs: int = meta["pairs"]["kept"]
        self.sites: dict[str, dict[str, Any]] = meta["sites"]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a store and check that it is what its metadata says.

        Raises:
            UserError: there is none, it is of another version, or a document is missing or wrong.
        """
        path = Path(path)
        meta, whole = read_root(path)
        if not (path / DOCUMENT).is_file():
            what = f"has no {DOCUMENT}" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}", "write a store with `fpo cache --out`")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{path} is not an fpo store, or its {DOCUMENT} is damaged",
                f"write one with `fpo cache --out`; if it was one, {REPAIR}",
            )
        if is_begun(meta):
            raise UserError(
                f"writing the tokens of {path} was interrupted",
                "run `fpo cache` again with the same flags",
            )
        version = str(meta.get("version"))
        if version.split(".")[0] != VERSION.split(".")[0]:
            raise UserError(
                f"{path} is a store of version {version}, this fpo reads version 1",
                "write the store again, or install the fpo that wrote it",
            )
        # Version 1.0 has no sums, and does not say T.
        early = version == "1.0" and "checksum" not in meta
        if early:
            meta["tokens"] = array_document(path, "tokens").get("shape", [None])[0]
        elif not whole:
            raise UserError(f"{path / DOCUMENT} is damaged or was edited", REPAIR)
        if wrong := wrong_attribute(meta):
            raise UserError(f"the metadata of {path} cannot be: {wrong}", REPAIR)
        check_documents(path, meta)
        try:
            store = cls(path, meta)
        except _BROKEN as error:
            raise UserError(f"{path} cannot be opened: {error}", REPAIR) from error
        store._check_arrays()
        return store

    def _check_arrays(self) -> None:
        for name, (shape, dtype, chunks) in layout(self.meta).items():
            if name.startswith(("blocks/layer_", "blocks/totals")) and not self.has_totals:
                continue
            try:
                array = self._array(name)
                found = array.shape, str(array.dtype), array.chunks
                codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]
            except _BROKEN as error:
                raise UserError(f"{self.path} lacks the array {name}", REPAIR) from error
            if found != (shape, dtype, chunks):
                raise UserError(
                    f"the array {name} of {self.path} is {found[1]} {found[0]} in chunks of "
                    f"{found[2]}, expected {dtype} {shape} in {chunks}",
                    REPAIR,
                )
            if codecs != _CODECS:
                raise UserError(
                    f"the array {name} of {self.path} has the codecs {', '.join(codecs)}, "
                    f"expected {', '.join(_CODECS)}",
                    REPAIR,
                )

    @property
    def blocks(self) -> int:
        """B, the number of blocks."""
        return -(-self.pairs // self.block_size)

    @property
    def non_finite(self) -> list[int]:
        """The pairs without reference rows, because their numbers were not finite; sorted."""
        return self.meta["pairs"].get("not_finite", [])

    @property
    def scored(self) -> int:
        """How many pairs of a complete store have reference rows."""
        return self.pairs - len(self.non_finite)

    @property
    def has_totals(self) -> bool:
        """Whether the blocks' totals are there, which version 1.0 deletes."""
        return "documents" in self.meta

    def pairs_in(self, block: int) -> slice:
        """The pairs of a block."""
        return slice(block * self.block_size, min((block + 1) * self.block_size, self.pairs))

    def block_length(self, block: int) -> int:
        """b, the number of pairs in a block."""
        rows = self.pairs_in(block)
        return rows.stop - rows.start

    def unscored_blocks(self) -> list[int]:
        """The blocks that have no reference rows yet."""
        return [block for block in range(self.blocks) if not self.is_scored(block)]

    def is_scored(self, block: int) -> bool:
        """Whether a block has its record, and so its reference rows."""
        # Nobody takes a record away while others write, and this is asked often.
        if block not in self._done:
            if not self._is_there("blocks/digest", block) or not self._record(block):
                return False
            self._done.add(block)
        return True

    def require_complete(self) -> None:
        """Refuse a store that still has gaps.

        Raises:
            UserError: it says how far the store got and what completes it.
        """
        if self.meta["state"] != "complete":
            done = self.blocks - len(self.unscored_blocks())
            raise UserError(
                f"{self.path} is {self.meta['state']}: {done} of {self.blocks} blocks are done",
                "complete it with the `fpo cache` command that began it",
            )

    def find_local(self, name: str, source: str, flag: str, *, was_local: bool = False) -> str:
        """Where a file or folder is that the store was made from.

        Args:
            name: in the attribute `paths`: model, or a site for its SAE.
            source: as it was named when the store was made.
            flag: of the command, which names its new place.
            was_local: whether the source was a path, if the store has no attribute `paths`.

        Returns:
            its path, or the source if that was not a path.

        Raises:
            UserError: it was a path and nothing is there now.
        """
        known = self.meta.get("paths", {}).get(name)
        if known is None and not was_local:
            return source
        places = [Path(source)]
        if known:
            relative = Path(os.path.normpath(self.path.resolve() / known["relative"]))
            places = [Path(known["absolute"]), relative, *places]
        for place in places:
            if place.exists():
                return str(place)
        raise UserError(
            f"{source}, from which {self.path} was made, is not found at "
            f"{' or '.join(dict.fromkeys(map(str, places)))}",
            f"name its new place with {flag}",
        )

    def require_same(self) -> dict[str, Any]:
        """Refuse a folder that holds another store by now.

        Returns:
            its attributes as they stand there now.

        Raises:
            UserError: it was replaced or removed since it was opened.
        """
        about = attributes(self.path)
        if about.get("fingerprint") != self.meta["fingerprint"]:
            raise UserError(
                f"{self.path} was replaced or removed meanwhile", "give the command again"
            )
        return about

    def tokens(self, block: int) -> TokenPairs:
        """The token runs of a block's pairs."""
        rows = self.pairs_in(block)
        spans = self._read("spans", rows, block)
        source_row = self._read("source_row", rows, block)
        begin, end = int(spans[0, 0]), int(spans[-1, 3])
        if not (begin >= 0 and end <= self.meta["tokens"] and (np.diff(spans) > 0).all()):
            raise self._damaged("spans", block, "they are no runs of tokens")
        ids = self._read("tokens", slice(begin, end), block)
        return TokenPairs(ids, spans - begin, source_row)

    def reference(self, block: int, tokens: TokenPairs) -> ReferenceValues:
        """The reference rows of a block.

        Args:
            block: which one.
            tokens: its token runs; the block's digest covers them too.

        Raises:
            UserError: a checksum is wrong, or the block is not what was written.
        """
        rows = self.pairs_in(block)
        reference = ReferenceValues(
            logp=self._read("ref/logp", rows, block),
            margin=self._read("ref/margin", rows, block),
            features={
                site: TopFeatures(
                    *(
                        self._read(f"features/{site}/{name}", rows, block)
                        for name in ("index", "value", "nonzero")
                    )
                )
                for site in self.sites
            },
        )
        if digest_of_block(tokens, reference) != self._record(block):
            raise self._damaged("blocks/digest", block, "the rows are not what it is the sum of")
        self.require_same()
        gaps = rows.start + np.flatnonzero(np.isnan(reference.margin))
        known = [pair for pair in self.non_finite if rows.start <= pair < rows.stop]
        if self.meta["state"] == "complete" and gaps.tolist() != known:
            raise self._damaged("ref/margin", block, "other pairs have no numbers than it is told")
        return reference

    def _record(self, block: int) -> np.uint64:
        """The digest that was written of a block; 0 for a gap."""
        return self._read("blocks/digest", slice(block, block + 1), block)[0]

    def read_array(self, name: str) -> np.ndarray:
        """All rows of one array, such as spans or ref/margin; what is not scored yet is gaps."""
        if self.meta["state"] == "complete" or name in ("tokens", "spans", "source_row"):
            array = self._array(name)
            for chunk in range(-(-array.shape[0] // array.chunks[0])):
                self._require_chunk(name, chunk, chunk if name != "tokens" else None)
        return self._read(name, slice(None))

    def mean(self, site: str) -> np.ndarray:
        """Mean pooled features over all responses: float32 [m]."""
        return self._total(f"features/{site}/mean")

    def frequency(self, site: str) -> np.ndarray:
        """How many chosen / rejected responses have each feature: int64 [2, m]."""
        return self._total(f"features/{site}/frequency")

    def _total(self, name: str) -> np.ndarray:
        self._require_chunk(name, 0, None)
        values = self._read(name, slice(None))
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self._damaged(name, None, "it holds gaps")
        return values

    def totals(self, block: int) -> dict[str, FeatureTotals]:
        """The sums over a block's responses, by site."""
        rows = slice(block, block + 1)
        totals = {
            site: FeatureTotals(
                self._read(f"blocks/{site}/sum", rows, block)[0],
                self._read(f"blocks/{site}/frequency", rows, block)[0],
            )
            for site in self.sites
        }
        if digest_of_totals(block, totals) != self._read("blocks/totals", rows, block)[0]:
            raise self._damaged("blocks/totals", block, "the sums are not what it is the sum of")
        return totals

    def sum_totals(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By site mean, float32 [m], and frequency, int64 [2, m], as the blocks' totals give
        them."""
        total = {
            site: FeatureTotals(np.zeros(about["d_sae"]), np.zeros((2, about["d_sae"]), np.int64))
            for site, about in self.sites.items()
        }
        for block in range(self.blocks):
            for site, part in self.totals(block).items():
                total[site].value[:] += part.value
                total[site].frequency[:] += part.frequency
        responses = 2 * self.scored
        return {
            site: ((made.value / responses).astype(np.float32), made.frequency)
            for site, made in total.items()
        }

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes per array: in memory and on disk."""
        arrays = {name: self._array(name) for name in layout(self.meta) if name in self._group}
        return {
            name: (array.nbytes, array.nbytes_stored()) for name, array in sorted(arrays.items())
        }

    def _array(self, name: str) -> Any:
        # Kept: zarr reads an array's metadata anew whenever it is looked up.
        if name not in self._arrays:
            # A chunk that happens to equal the fill value is written all the same: a file that is
            # missing then always means a gap.
            self._arrays[name] = self._group[name].with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _read(self, name: str, rows: slice, block: int | None = None) -> np.ndarray:
        """Rows of an array; those of a block must be there."""
        array = self._array(name)
        if block is not None:
            for chunk in range(rows.start // array.chunks[0], -(-rows.stop // array.chunks[0])):
                self._require_chunk(name, chunk, block)
        try:
            return np.asarray(array[rows])
        except _BROKEN as error:
            raise self._damaged(name, block, str(error)) from error

    def _require_chunk(self, name: str, chunk: int, block: int | None) -> None:
        """zarr gives the fill value for a chunk that is missing, without a word."""
        if not self._is_there(name, chunk):
            raise self._damaged(name, block, f"chunk {chunk} is missing")

    def _is_there(self, name: str, chunk: int) -> bool:
        array = self._array(name)
        key = array.metadata.encode_chunk_key((chunk, *[0] * (array.ndim - 1)))
        return (self.path / name / key).is_file()

    def _damaged(self, name: str, block: int | None, why: str) -> UserError:
        rows = self.pairs_in(block) if block is not None else None
        where = f", block {block} (pairs {rows.start} to {rows.stop - 1})," if rows else ""
        return UserError(f"the array {name}{where} of {self.path} is damaged: {why}", REPAIR)
