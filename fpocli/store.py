"""The store of a frozen reference, version 1: docs/format.md in code. The only importer of zarr.

layout.py says what it must look like; here it is written and read.
Shapes: N pairs, T tokens, K kept features, m features of a site, B blocks, b pairs of one block.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from fpocli.documents import (
    DOCUMENT,
    REPAIR,
    array_document,
    attributes,
    check_documents,
    document_sums,
    is_whole,
    write_root,
)
from fpocli.errors import UserError
from fpocli.files import remove_folder
from fpocli.layout import FORMAT, VERSION, fingerprint, layout, wrong_attribute
from fpocli.rows import Features, Reference, Tokens, Totals

# In this order; anything else may hide damage.
_CODECS = ["bytes", "zstd", "crc32c"]
# What zarr raises where a chunk is not what it should be.
_BROKEN = (ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError)


class Store:
    """An open store. Make one with `create` or `open`."""

    def __init__(self, path: Path, meta: dict[str, Any], *, writable: bool) -> None:
        self.path, self.meta = path, meta
        self._group: Any = zarr.open_group(path, mode="r+" if writable else "r", zarr_format=3)
        self._arrays: dict[str, Any] = {}
        self._done: set[int] = set()
        self.block_size: int = meta["block"]
        self.pairs: int = meta["pairs"]["kept"]
        self.sites: dict[str, dict[str, Any]] = meta["sites"]

    # -- making one --------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, about: dict[str, Any], tokens: Tokens) -> "Store":
        """Write the token runs and lay out the rest, filled with gaps.

        Args:
            path: a folder that is empty or not there yet.
            about: the attributes of docs/format.md but those that are made here (format, version,
                state, tokens, fingerprint, documents, checksum, and created if it lacks it).
            tokens: all pairs; spans count from the first token of the store.
        """
        path.mkdir(parents=True, exist_ok=True)
        # A store that says no more was stopped on the way here and starts over.
        write_root(path, {"format": FORMAT})
        meta = {"created": datetime.now(UTC).isoformat(timespec="seconds")} | about
        meta |= {
            "format": FORMAT,
            "version": VERSION,
            "state": "tokenised",
            "tokens": len(tokens.ids),
            "fingerprint": fingerprint(about),
        }
        store = cls(path, meta, writable=True)
        # Here too, so that blocks are known when the root's document is lost.
        store._group.create_group("blocks", attributes={"fingerprint": meta["fingerprint"]})
        for name, array in layout(meta).items():
            store._group.create_array(
                name,
                **array._asdict(),
                compressors=[ZstdCodec(level=3), Crc32cCodec()],
                fill_value=array.fill(name),
            )
        store._array("tokens")[:] = tokens.ids
        store._array("spans")[:] = tokens.spans
        store._array("source_row")[:] = tokens.source_row
        meta["documents"] = document_sums(path)
        # Written last.
        write_root(path, meta)
        return store

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = False) -> "Store":
        """Open a store and check that it is what its metadata says.

        Raises:
            UserError: there is none, it is of another version, or a document is missing or wrong.
        """
        path = Path(path)
        meta = attributes(path)
        if not (path / DOCUMENT).is_file():
            what = f"has no {DOCUMENT}" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}", "write a store with `fpo cache --out`")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{path} is not an fpo store, or its {DOCUMENT} is damaged",
                f"write one with `fpo cache --out`; if it was one, {REPAIR}",
            )
        if meta.keys() <= {"format", "checksum"}:
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
        elif not is_whole(path):
            raise UserError(f"{path / DOCUMENT} is damaged or was edited", REPAIR)
        if wrong := wrong_attribute(meta):
            raise UserError(f"the metadata of {path} cannot be: {wrong}", REPAIR)
        check_documents(path, meta)
        store = cls(path, meta, writable=writable)
        store._check_arrays()
        if early and writable and meta["state"] != "complete":
            raise UserError(
                f"{path} was begun by an earlier version of fpo",
                "complete it with that version, or give --overwrite",
            )
        return store

    @staticmethod
    def require_replaceable(path: Path) -> None:
        """Refuse a path that holds anything but a store, the beginning of one, or nothing."""
        known = attributes(path).get("format") == FORMAT or Store.fingerprint_of_blocks(path)
        if path.exists() and not (known or _is_empty(path)):
            raise UserError(f"{path} exists and is not an fpo store", "give another --out")

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a store, or what an interrupted `create` left; never anything else."""
        Store.require_replaceable(path)
        remove_folder(path)

    @staticmethod
    def unfinished(path: Path) -> bool:
        """Whether `path` is an empty folder or what an interrupted `create` left."""
        about = attributes(path)
        return _is_empty(path) or about == {"format": FORMAT, "checksum": about.get("checksum")}

    def _check_arrays(self) -> None:
        for name, (shape, dtype, chunks) in layout(self.meta).items():
            if name.startswith("blocks/layer_") and not self.has_totals:
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

    # -- writing -----------------------------------------------------------------------------

    def gaps(self, b: int) -> Reference:
        """Rows of b pairs to be filled, which hold gaps."""
        arrays = layout(self.meta)

        def rows(name: str) -> np.ndarray:
            array = arrays[name]
            return np.full((b, *array.shape[1:]), array.fill(name), array.dtype)

        features = {
            site: Features(
                *(rows(f"features/{site}/{name}") for name in ("index", "value", "nonzero"))
            )
            for site in self.sites
        }
        return Reference(rows("ref/logp"), rows("ref/margin"), features)

    def write_block(self, block: int, reference: Reference, totals: dict[str, Totals]) -> None:
        """Write the reference rows of a block, whole, and its record last."""
        if self.meta["state"] == "tokenised":
            self._set_state("partial")
        rows = self.rows(block)
        self._array("ref/logp")[rows] = reference.logp
        self._array("ref/margin")[rows] = reference.margin
        for site, features in reference.features.items():
            for name in ("index", "value", "nonzero"):
                self._array(f"features/{site}/{name}")[rows] = getattr(features, name)
            self._array(f"blocks/{site}/sum")[block] = totals[site].value
            self._array(f"blocks/{site}/frequency")[block] = totals[site].frequency
        self._array("blocks/digest")[block] = self._digest(self.tokens(block), reference)

    def forget_block(self, block: int) -> None:
        """Take a block's record away, so that it is scored anew."""
        self._array("blocks/digest")[block] = 0
        self._done.discard(block)

    def finish(self) -> None:
        """Make mean and frequency from the blocks' totals and mark the store complete."""
        not_finite = np.flatnonzero(np.isnan(self.whole("ref/margin"))).tolist()
        if len(not_finite) == self.pairs:
            raise UserError(
                f"no pair of {self.path} has finite numbers", "try --dtype float32, or another SAE"
            )
        if not_finite:
            self.meta["pairs"]["not_finite"] = not_finite
        for site in self.sites:
            mean, frequency = self.total(site)
            self._array(f"features/{site}/mean")[:] = mean
            self._array(f"features/{site}/frequency")[:] = frequency
        self._set_state("complete")
        # What kills left of chunks; nobody else writes any more.
        for left in self.path.rglob("*.partial"):
            left.unlink()

    def _set_state(self, state: str) -> None:
        self.meta["state"] = state
        write_root(self.path, self.meta)

    @classmethod
    def mend(cls, path: Path, about: dict[str, Any], tokens: Tokens) -> "Store":
        """Write a store's documents and tokens anew and keep the blocks' rows, which may belong to
        them or not. The store is then partial.

        Args:
            path: of the store.
            about, tokens: as `create` takes them.
        """
        fresh = path.with_name(path.name + ".repair")
        remove_folder(fresh)
        meta = cls.create(fresh, about, tokens).meta
        # The root's document last.
        for file in sorted(file for file in fresh.rglob("*") if file.is_file()):
            there = path / file.relative_to(fresh)
            there.parent.mkdir(parents=True, exist_ok=True)
            file.replace(there)
        remove_folder(fresh)
        store = cls(path, meta, writable=True)
        store._set_state("partial")
        return store

    @staticmethod
    def fingerprint_of_blocks(path: Path) -> str | None:
        """What the blocks of a store belong to, where the root's document is lost."""
        return array_document(path, "blocks").get("attributes", {}).get("fingerprint")

    # -- reading -----------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """B, the number of blocks."""
        return -(-self.pairs // self.block_size)

    @property
    def not_finite(self) -> list[int]:
        """The pairs without reference rows, because their numbers were not finite; sorted."""
        return self.meta["pairs"].get("not_finite", [])

    @property
    def scored(self) -> int:
        """How many pairs of a complete store have reference rows."""
        return self.pairs - len(self.not_finite)

    @property
    def has_totals(self) -> bool:
        """Whether the blocks' totals are there, which version 1.0 deletes."""
        return "documents" in self.meta

    def rows(self, block: int) -> slice:
        """The pairs of a block."""
        return slice(block * self.block_size, min((block + 1) * self.block_size, self.pairs))

    def length(self, block: int) -> int:
        """b, the number of pairs in a block."""
        rows = self.rows(block)
        return rows.stop - rows.start

    def missing_blocks(self) -> list[int]:
        """The blocks that have no reference rows yet."""
        return [block for block in range(self.blocks) if not self.has(block)]

    def has(self, block: int) -> bool:
        """Whether a block has its record, and so its reference rows."""
        # Nobody takes a record away while others write, and this is asked often.
        if block not in self._done:
            one = slice(block, block + 1)
            if not self._is_there("blocks/digest", block) or not self._read(
                "blocks/digest", one, block
            ):
                return False
            self._done.add(block)
        return True

    def require_complete(self) -> None:
        """Refuse a store that still has gaps.

        Raises:
            UserError: it says how far the store got and what completes it.
        """
        if self.meta["state"] != "complete":
            done = self.blocks - len(self.missing_blocks())
            raise UserError(
                f"{self.path} is {self.meta['state']}: {done} of {self.blocks} blocks are done",
                "complete it with the `fpo cache` command that began it",
            )

    def tokens(self, block: int) -> Tokens:
        """The token runs of a block's pairs."""
        rows = self.rows(block)
        spans = self._read("spans", rows, block)
        source_row = self._read("source_row", rows, block)
        begin, end = int(spans[0, 0]), int(spans[-1, 3])
        if not (begin >= 0 and end <= self.meta["tokens"] and (np.diff(spans) > 0).all()):
            raise self._damaged("spans", block, "they are no runs of tokens")
        ids = self._read("tokens", slice(begin, end), block)
        return Tokens(ids, spans - begin, source_row)

    def reference(self, block: int, tokens: Tokens) -> Reference:
        """The reference rows of a block.

        Args:
            block: which one.
            tokens: its token runs; the block's digest covers them too.

        Raises:
            UserError: a checksum is wrong, or the block is not what was written.
        """
        rows = self.rows(block)
        reference = Reference(
            logp=self._read("ref/logp", rows, block),
            margin=self._read("ref/margin", rows, block),
            features={
                site: Features(
                    *(
                        self._read(f"features/{site}/{name}", rows, block)
                        for name in ("index", "value", "nonzero")
                    )
                )
                for site in self.sites
            },
        )
        record = self._read("blocks/digest", slice(block, block + 1), block)[0]
        if self._digest(tokens, reference) != record:
            raise self._damaged("blocks/digest", block, "the rows are not what it is the sum of")
        gaps = rows.start + np.flatnonzero(np.isnan(reference.margin))
        known = [pair for pair in self.not_finite if rows.start <= pair < rows.stop]
        if self.meta["state"] == "complete" and gaps.tolist() != known:
            raise self._damaged("ref/margin", block, "other pairs have no numbers than it is told")
        return reference

    def whole(self, name: str) -> np.ndarray:
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

    def totals(self, block: int, site: str) -> Totals:
        """The sums over a block's responses."""
        rows = slice(block, block + 1)
        totals = Totals(
            self._read(f"blocks/{site}/sum", rows, block)[0],
            self._read(f"blocks/{site}/frequency", rows, block)[0],
        )
        if not np.isfinite(totals.value).all() or (totals.frequency < 0).any():
            raise self._damaged(f"blocks/{site}", block, "they are no sums")
        return totals

    def total(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean, float32 [m], and frequency, int64 [2, m], as the blocks' totals give them."""
        m = self.sites[site]["d_sae"]
        mean, frequency = np.zeros(m), np.zeros((2, m), np.int64)
        for block in range(self.blocks):
            totals = self.totals(block, site)
            mean += totals.value
            frequency += totals.frequency
        return (mean / (2 * max(1, self.scored))).astype(np.float32), frequency

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
        rows = self.rows(block) if block is not None else None
        where = f", block {block} (pairs {rows.start} to {rows.stop - 1})," if rows else ""
        return UserError(f"the array {name}{where} of {self.path} is damaged: {why}", REPAIR)

    @staticmethod
    def _digest(tokens: Tokens, reference: Reference) -> np.uint64:
        """64 bits of sha256 over the decoded content of a block; never 0, which means a gap."""
        digest = hashlib.sha256()
        arrays = [tokens.ids, np.diff(tokens.spans), tokens.source_row]
        arrays += [reference.logp, reference.margin]
        for site in sorted(reference.features):
            features = reference.features[site]
            arrays += [features.index, features.value, features.nonzero]
        for array in arrays:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            digest.update(little.tobytes())
        return np.uint64(int.from_bytes(digest.digest()[:8], "little") or 1)


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing, or the first document half written."""
    return path.is_dir() and all(file.suffix == ".partial" for file in path.iterdir())
