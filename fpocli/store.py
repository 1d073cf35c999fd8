"""The store of a frozen reference, version 1: docs/format.md in code. The only importer of zarr.

Shapes: N pairs, T tokens, K kept features, m features of a site, B blocks, b pairs of one block.
"""

import hashlib
import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from fpocli.errors import UserError
from fpocli.rows import Features, Reference, Tokens, Totals

FORMAT, VERSION = "fpo-store", "1.0"
_TOKENS_PER_CHUNK = 2**18
# Shape, dtype and chunks of an array.
_Layout = tuple[tuple[int, ...], str, tuple[int, ...]]
_STATES = ("tokenised", "partial", "complete")


class Store:
    """An open store. Make one with `create` or `open`."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        # Any: zarr's types do not tell arrays from groups.
        root: Any = group
        self._group = root
        self._arrays: dict[str, Any] = {}
        self.meta: dict[str, Any] = dict(root.attrs["fpo"])
        self.block_size: int = self.meta["block"]
        self.pairs: int = self.meta["pairs"]["kept"]
        self.sites: dict[str, dict[str, Any]] = self.meta["sites"]

    # -- making one --------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, meta: dict[str, Any], tokens: Tokens) -> "Store":
        """Write the token runs and lay out the rest, filled with gaps.

        Args:
            path: a folder that is not there yet.
            meta: the attributes of docs/format.md but those this module owns (format, version,
                state, created, fingerprint).
            tokens: all pairs; spans count from the first token of the store.
        """
        begun = {"fpo": {"format": FORMAT}}
        group = zarr.create_group(path, zarr_format=3, attributes=begun)
        for name, (shape, dtype, chunks) in _layout(meta, len(tokens.ids)).items():
            _add(group, name, shape, dtype, chunks)
        arrays: Any = group
        arrays["tokens"][:] = tokens.ids
        arrays["spans"][:] = tokens.spans
        arrays["source_row"][:] = tokens.source_row
        own = {
            "format": FORMAT,
            "version": VERSION,
            "state": "tokenised",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint(meta),
        }
        # Written last: a store without a state was stopped on the way here and starts over.
        group.attrs["fpo"] = own | meta
        return cls(path, group)

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = False) -> "Store":
        """Open a store and check that it is what its metadata says.

        Raises:
            UserError: there is none, it is of another version, or an array is missing or wrong.
        """
        path = Path(path)
        try:
            group = zarr.open_group(path, mode="r+" if writable else "r", zarr_format=3)
            meta = group.attrs.get("fpo")
        except (OSError, KeyError, ValueError, TypeError) as error:
            what = "is no Zarr group" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}", "write a store with `fpo cache --out`") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{path} is not an fpo store", "write one with `fpo cache --out`")
        if meta.keys() == {"format"}:
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
        try:
            store = cls(path, group)
            store._check_arrays()
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the metadata of {path} lacks {error}", "write the store again"
            ) from error
        return store

    @staticmethod
    def require_replaceable(path: Path) -> None:
        """Refuse a path that holds anything but a store, the beginning of one, or nothing."""
        if path.exists() and not (_is_empty(path) or _attributes(path)):
            raise UserError(f"{path} exists and is not an fpo store", "give another --out")

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a store, or what an interrupted `create` left; never anything else."""
        Store.require_replaceable(path)
        if path.exists():
            shutil.rmtree(path)

    @staticmethod
    def unfinished(path: Path) -> bool:
        """Whether `path` is an empty folder or what an interrupted `create` left."""
        return _is_empty(path) or _attributes(path).keys() == {"format"}

    def _check_arrays(self) -> None:
        if self.meta["state"] not in _STATES:
            raise KeyError("a known state")
        for name, (shape, dtype, _) in _layout(self.meta).items():
            # The blocks' totals are gone once mean and frequency are made of them.
            if name.startswith("blocks/") and name != "blocks/digest":
                continue
            array = self._group.get(name)
            if not isinstance(array, zarr.Array):
                raise UserError(f"{self.path} lacks the array {name}", "write the store again")
            if str(array.dtype) != dtype or array.shape != (shape or array.shape):
                raise UserError(
                    f"the array {name} of {self.path} is {array.dtype} {array.shape}, expected "
                    f"{dtype} {shape}",
                    "write the store again",
                )

    # -- writing -----------------------------------------------------------------------------

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

    def finish(self) -> None:
        """Make mean and frequency from the blocks' totals and mark the store complete."""
        for site in self.sites:
            parts = self._array(f"blocks/{site}/sum")
            counts = self._array(f"blocks/{site}/frequency")
            mean = np.zeros(parts.shape[1])
            frequency = np.zeros(counts.shape[1:], np.int64)
            for block in range(self.blocks):
                total = self._read(f"blocks/{site}/sum", block, block)
                count = self._read(f"blocks/{site}/frequency", block, block)
                if np.isnan(total).any() or (count < 0).any():
                    self._array("blocks/digest")[block] = 0
                    raise UserError(
                        f"block {block} of {self.path} has lost its totals",
                        "give the same command again, it scores the block anew",
                    )
                mean += total
                frequency += count
            self._array(f"features/{site}/mean")[:] = mean / (2 * self.pairs)
            self._array(f"features/{site}/frequency")[:] = frequency
        self._set_state("complete")
        for site in self.sites:
            del self._group[f"blocks/{site}"]

    def _set_state(self, state: str) -> None:
        self.meta["state"] = state
        self._group.attrs["fpo"] = self.meta

    # -- reading -----------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """B, the number of blocks."""
        return -(-self.pairs // self.block_size)

    def rows(self, block: int) -> slice:
        """The pairs of a block."""
        return slice(block * self.block_size, min((block + 1) * self.block_size, self.pairs))

    def length(self, block: int) -> int:
        """b, the number of pairs in a block."""
        rows = self.rows(block)
        return rows.stop - rows.start

    def missing_blocks(self) -> list[int]:
        """The blocks that have no reference rows yet."""
        return np.flatnonzero(self.whole("blocks/digest") == 0).tolist()

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
        ids = self._read("tokens", slice(spans[0, 0], spans[-1, 3]), block)
        return Tokens(ids, spans - spans[0, 0], self._read("source_row", rows, block))

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
        if self._digest(tokens, reference) != self._read("blocks/digest", block, block):
            raise self._damaged("a block record", block, "its content is not what was written")
        return reference

    def whole(self, name: str) -> np.ndarray:
        """All rows of one small array, such as spans or ref/margin."""
        return self._read(name, slice(None))

    def mean(self, site: str) -> np.ndarray:
        """Mean pooled features over all 2N responses: float32 [m]."""
        return self._total(f"features/{site}/mean")

    def frequency(self, site: str) -> np.ndarray:
        """How many chosen / rejected responses have each feature: int64 [2, m]."""
        return self._total(f"features/{site}/frequency")

    def _total(self, name: str) -> np.ndarray:
        values = self.whole(name)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self._damaged(f"the array {name}", None, "a chunk is missing")
        return values

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes per array: in memory and on disk."""
        arrays = [
            (name, item)
            for name, item in self._group.members(max_depth=None)
            if isinstance(item, zarr.Array)
        ]
        return {name: (item.nbytes, item.nbytes_stored()) for name, item in sorted(arrays)}

    def _array(self, name: str) -> Any:
        # Kept: zarr reads an array's metadata anew whenever it is looked up.
        if name not in self._arrays:
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    def _read(self, name: str, rows: Any, block: int | None = None) -> np.ndarray:
        try:
            return np.asarray(self._array(name)[rows])
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise self._damaged(f"the array {name}", block, str(error)) from error

    def _damaged(self, what: str, block: int | None, why: str) -> UserError:
        rows = self.rows(block) if block is not None else None
        where = f", block {block} (pairs {rows.start} to {rows.stop - 1})" if rows else ""
        return UserError(f"{what} of {self.path}{where} is damaged: {why}", "write the store again")

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


def index_dtype(m: int) -> str:
    """The dtype of feature indices: its largest value must stay free for unused slots."""
    return "uint16" if m <= 65_535 else "uint32"


def fingerprint(meta: dict[str, Any]) -> str:
    """sha256 of all that determines a store's content."""
    identity = {name: value for name, value in meta.items() if name not in ("writer", "pairs")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def raw_bytes(meta: dict[str, Any], tokens: int) -> int:
    """Size of a store before compression."""
    return sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for shape, dtype, _ in _layout(meta, tokens).values()
    )


def _layout(meta: dict[str, Any], tokens: int | None = None) -> dict[str, _Layout]:
    """Shape, dtype and chunks of every array.

    Args:
        meta: the store's attributes.
        tokens: T; without it the shape of `tokens` is left open, as ().
    """
    n, block = meta["pairs"]["kept"], meta["block"]
    blocks = -(-n // block)
    arrays: dict[str, _Layout] = {
        "tokens": (() if tokens is None else (tokens,), "uint32", (_TOKENS_PER_CHUNK,)),
        "spans": ((n, 4), "int64", (block, 4)),
        "source_row": ((n,), "int64", (block,)),
        "ref/logp": ((n, 2), "float32", (block, 2)),
        "ref/margin": ((n,), "float32", (block,)),
        "blocks/digest": ((blocks,), "uint64", (1,)),
    }
    for site, about in meta["sites"].items():
        k, m = about["k"], about["d_sae"]
        features, parts = f"features/{site}", f"blocks/{site}"
        arrays |= {
            f"{features}/index": ((n, 2, k), index_dtype(m), (block, 2, k)),
            f"{features}/value": ((n, 2, k), about["value_dtype"], (block, 2, k)),
            f"{features}/nonzero": ((n, 2), "int32", (block, 2)),
            f"{features}/mean": ((m,), "float32", (m,)),
            f"{features}/frequency": ((2, m), "int64", (2, m)),
            f"{parts}/sum": ((blocks, m), "float64", (1, m)),
            f"{parts}/frequency": ((blocks, 2, m), "int64", (1, 2, m)),
        }
    return arrays


def _add(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]
) -> zarr.Array:
    """An array whose chunks carry a checksum, and whose gaps cannot be read as values."""
    kind = np.dtype(dtype)
    fill: Any = 0
    if kind.kind == "f":
        fill = np.nan
    elif name.endswith("/index"):
        fill = np.iinfo(kind).max
    elif name.endswith(("/nonzero", "/frequency")):
        fill = -1
    return group.create_array(
        name,
        shape=shape,
        dtype=kind,
        chunks=chunks,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=fill,
        # A chunk that happens to equal the fill value is written all the same: a file that is
        # missing then always means a gap.
        config={"write_empty_chunks": True},
    )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _attributes(path: Path) -> dict[str, Any]:
    """What a folder's group says under `fpo`, if it is a store or the beginning of one; else {}."""
    try:
        about: Any = zarr.open_group(path, mode="r", zarr_format=3).attrs.get("fpo")
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) and about.get("format") == FORMAT else {}
