"""The store of a frozen reference, version 1: docs/format.md in code. The only importer of zarr.

Shapes: N pairs, T tokens, K kept features, m features of a site, B blocks, b pairs of one block.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from fpocli.errors import UserError
from fpocli.tokens import TokenPair

FORMAT, VERSION = "fpo-store", "1.0"
_TOKENS_PER_CHUNK = 2**18
_TOKEN_ARRAYS = {"tokens", "spans", "source_row"}


@dataclass(frozen=True)
class Features:
    """Pooled features of b pairs at one site; column 0 is chosen, column 1 rejected.

    Args:
        index: [b, 2, K] the K largest, by falling value.
        value: [b, 2, K] their values.
        nonzero: int32 [b, 2], how many of the m features are > 0.
    """

    index: np.ndarray
    value: np.ndarray
    nonzero: np.ndarray


@dataclass(frozen=True)
class Totals:
    """Sums over the 2b responses of a block, from which mean and frequency are made.

    Args:
        value: float64 [m], sum of the pooled vectors.
        frequency: int64 [2, m], how many chosen / rejected responses have the feature > 0.
    """

    value: np.ndarray
    frequency: np.ndarray


@dataclass(frozen=True)
class Reference:
    """What the reference says of b pairs.

    Args:
        logp: float32 [b, 2], S_ref in nats.
        margin: float32 [b], a_ref(chosen) - a_ref(rejected), nats per token.
        features: by site.
    """

    logp: np.ndarray
    margin: np.ndarray
    features: dict[str, Features]


@dataclass(frozen=True)
class Tokens:
    """The token runs of b pairs.

    Args:
        ids: uint32, pair after pair: prompt, chosen, rejected.
        spans: int64 [b, 4], start of prompt, of chosen, of rejected and end, as offsets into ids.
        source_row: int64 [b].
    """

    ids: np.ndarray
    spans: np.ndarray
    source_row: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def pair(self, number: int) -> TokenPair:
        """One of the b pairs."""
        prompt, chosen, rejected = (self.ids[a:b] for a, b in pairwise(self.spans[number]))
        return TokenPair(prompt, chosen, rejected, int(self.source_row[number]))

    @property
    def counts(self) -> np.ndarray:
        """n of chosen and rejected: int64 [b, 2]."""
        return np.diff(self.spans[:, 1:])


class Store:
    """An open store. Make one with `create` or `open`."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        # Any: zarr's types do not tell arrays from groups.
        root: Any = group
        self._group = root
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
        group = zarr.create_group(path, zarr_format=3)
        block, n = meta["block"], len(tokens)
        blocks = -(-n // block)
        _add(group, "tokens", tokens.ids.shape, "uint32", (_TOKENS_PER_CHUNK,))[:] = tokens.ids
        _add(group, "spans", (n, 4), "int64", (block, 4))[:] = tokens.spans
        _add(group, "source_row", (n,), "int64", (block,))[:] = tokens.source_row
        _add(group, "ref/logp", (n, 2), "float32", (block, 2))
        _add(group, "ref/margin", (n,), "float32", (block,))
        for site, about in meta["sites"].items():
            k, m = about["k"], about["d_sae"]
            _add(group, f"features/{site}/index", (n, 2, k), index_dtype(m), (block, 2, k))
            _add(group, f"features/{site}/value", (n, 2, k), about["value_dtype"], (block, 2, k))
            _add(group, f"features/{site}/nonzero", (n, 2), "int32", (block, 2))
            _add(group, f"features/{site}/mean", (m,), "float32", (m,))
            _add(group, f"features/{site}/frequency", (2, m), "int64", (2, m))
            _add(group, f"blocks/{site}/sum", (blocks, m), "float64", (1, m))
            _add(group, f"blocks/{site}/frequency", (blocks, 2, m), "int64", (1, 2, m))
        _add(group, "blocks/digest", (blocks,), "uint64", (1,))
        own = {
            "format": FORMAT,
            "version": VERSION,
            "state": "tokenised",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint(meta),
        }
        # Written last: a folder without it was stopped on the way here and starts over.
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
            raise UserError(
                f"{path} is not an fpo store, or writing its tokens was interrupted",
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
    def remove(path: Path) -> None:
        """Delete a store, or what an interrupted `create` left; never anything else."""
        if path.is_dir() and (not any(path.iterdir()) or _is_ours(path)):
            shutil.rmtree(path)
        elif path.exists():
            raise UserError(f"{path} exists and is not an fpo store", "give another --out")

    @staticmethod
    def unfinished(path: Path) -> bool:
        """Whether `path` is an empty folder or what an interrupted `create` left."""
        if path.is_dir() and not any(path.iterdir()):
            return True
        return _is_ours(path) and "fpo" not in zarr.open_group(path, mode="r").attrs

    def _check_arrays(self) -> None:
        n, blocks = self.pairs, self.blocks
        if self.meta["state"] not in ("tokenised", "partial", "complete"):
            raise KeyError("a known state")
        expected: dict[str, tuple[tuple[int, ...] | None, tuple[str, ...]]] = {
            "tokens": (None, ("uint32",)),
            "spans": ((n, 4), ("int64",)),
            "source_row": ((n,), ("int64",)),
            "ref/logp": ((n, 2), ("float32",)),
            "ref/margin": ((n,), ("float32",)),
            "blocks/digest": ((blocks,), ("uint64",)),
        }
        for site, about in self.sites.items():
            k, m = about["k"], about["d_sae"]
            root = f"features/{site}"
            expected |= {
                f"{root}/index": ((n, 2, k), (index_dtype(m),)),
                f"{root}/value": ((n, 2, k), (about["value_dtype"],)),
                f"{root}/nonzero": ((n, 2), ("int32",)),
                f"{root}/mean": ((m,), ("float32",)),
                f"{root}/frequency": ((2, m), ("int64",)),
            }
        for name, (shape, dtypes) in expected.items():
            array = self._group.get(name)
            if not isinstance(array, zarr.Array):
                raise UserError(f"{self.path} lacks the array {name}", "write the store again")
            if str(array.dtype) not in dtypes or (shape and array.shape != shape):
                raise UserError(
                    f"the array {name} of {self.path} is {array.dtype} {array.shape}, expected "
                    f"{' or '.join(dtypes)} {shape or ''}",
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
                mean += self._read(f"blocks/{site}/sum", block, block)
                frequency += self._read(f"blocks/{site}/frequency", block, block)
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
        return self._group[name]

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


def raw_bytes(tokens: int, pairs: int, sites: dict[str, dict[str, Any]]) -> int:
    """Size of a store before compression."""
    per_pair = 4 * 8 + 8 + 3 * 4
    for about in sites.values():
        index_bytes = np.dtype(index_dtype(about["d_sae"])).itemsize
        value_bytes = np.dtype(about["value_dtype"]).itemsize
        per_pair += 2 * about["k"] * (index_bytes + value_bytes) + 8
    fixed = sum(about["d_sae"] * (4 + 16) for about in sites.values())
    return 4 * tokens + pairs * per_pair + fixed


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


def _is_ours(path: Path) -> bool:
    """Whether a folder is a store or the beginning of one."""
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    about = group.attrs.get("fpo")
    known = _TOKEN_ARRAYS | {"ref", "features", "blocks"}
    if about is None:
        return all(item.name in known | {"zarr.json"} for item in path.iterdir())
    return isinstance(about, dict) and about.get("format") == FORMAT
