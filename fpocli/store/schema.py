"""The arrays and attributes of a store, as docs/format.md defines them. Reads and writes nothing.

Shapes: N pairs, T tokens, K stored features, F features that are stored for every response,
m features of a site, b pairs of a block, B blocks; of next-token distributions R rows, n tokens.
"""

import hashlib
import json
import math
from typing import Any, NamedTuple

import numpy as np

from fpocli.store.distribution_rows import Distributions

FORMAT, VERSION = "fpo-store", "1.3"
TOKENS_PER_CHUNK = 2**18
# Attributes that determine the content; the fingerprint covers them, and those that not every
# store has.
_IDENTITY = ("data", "tokenizer", "limits", "model", "sites", "block")
_IDENTITY_IF_PRESENT = ("distributions",)


class ArraySchema(NamedTuple):
    """Shape, dtype and chunks of an array, and the shards if several chunks make up a file."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shards = f", shards of {self.shards}" if self.shards else ""
        return f"{self.dtype} {self.shape} in chunks of {self.chunks}{shards}"

    @property
    def bytes(self) -> int:
        """Size of the array, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        """Size of a file's content, a chunk or shard, uncompressed."""
        return math.prod(self.shards or self.chunks) * np.dtype(self.dtype).itemsize

    def fill(self, name: str) -> Any:
        """The fill value, which stands for a missing value and is never a valid one."""
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return np.nan
        if name.endswith("/index"):
            return int(np.iinfo(kind).max)
        return -1 if name.endswith(("/nonzero", "/frequency")) else 0


def index_dtype(m: int) -> str:
    """The dtype of feature indices; its largest value is reserved for unused slots."""
    return "uint16" if m <= 65_535 else "uint32"


def kept_features(about: dict[str, Any]) -> list[int]:
    """The features of a site that are stored for every response, rising; from its attributes."""
    return about.get("keep", [])


def fingerprint(meta: dict[str, Any]) -> str:
    """sha256 over all attributes that determine a store's content."""
    identity = {name: meta[name] for name in _IDENTITY}
    identity |= {name: meta[name] for name in _IDENTITY_IF_PRESENT if name in meta}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def array_schema(meta: dict[str, Any]) -> dict[str, ArraySchema]:
    """Shape, dtype and chunks of every array of a store with these attributes.

    No file spans two blocks of pairs.
    """
    n, block = meta["pairs"]["kept"], meta["block"]
    blocks = -(-n // block)
    arrays = {
        "tokens": ArraySchema((meta["tokens"],), "uint32", (TOKENS_PER_CHUNK,)),
        "spans": ArraySchema((n, 4), "int64", (block, 4)),
        "source_row": ArraySchema((n,), "int64", (block,)),
        "ref/logp": ArraySchema((n, 2), "float32", (block, 2)),
        "ref/margin": ArraySchema((n,), "float32", (block,)),
        "blocks/digest": ArraySchema((blocks,), "uint64", (1,)),
        "blocks/totals": ArraySchema((blocks,), "uint64", (1,)),
    }
    if "sources" in meta["pairs"]:
        arrays["source"] = ArraySchema((n,), "uint16", (block,))
    for site, about in meta["sites"].items():
        k, m = about["k"], about["d_sae"]
        features, parts = f"features/{site}", f"blocks/{site}"
        arrays |= {
            f"{features}/index": ArraySchema((n, 2, k), index_dtype(m), (block, 2, k)),
            f"{features}/value": ArraySchema((n, 2, k), about["value_dtype"], (block, 2, k)),
            f"{features}/nonzero": ArraySchema((n, 2), "int32", (block, 2)),
            f"{features}/mean": ArraySchema((m,), "float32", (m,)),
            f"{features}/frequency": ArraySchema((2, m), "int64", (2, m)),
            f"{parts}/sum": ArraySchema((blocks, m), "float64", (1, m)),
            f"{parts}/frequency": ArraySchema((blocks, 2, m), "int64", (1, 2, m)),
        }
        if kept := len(kept_features(about)):
            dtype = about["value_dtype"]
            arrays[f"{features}/kept"] = ArraySchema((n, 2, kept), dtype, (block, 2, kept))
            arrays["blocks/kept"] = ArraySchema((blocks,), "uint64", (1,))
    if about := Distributions.of(meta):
        arrays |= {
            "ref/top/rows": ArraySchema((n, 3), "int64", (block, 3)),
            "ref/top/digest": ArraySchema((n,), "uint64", (block,)),
        } | _distribution_arrays(about, meta["distribution_rows"])
    return arrays


def _distribution_arrays(about: Distributions, rows: dict[str, int]) -> dict[str, ArraySchema]:
    def array(dtype: str, *row: int) -> ArraySchema:
        shape, chunk, shard = ((rows[name], *row) for name in ("padded", "chunk", "shard"))
        return ArraySchema(shape, dtype, chunk, shard)

    ids = {} if about.whole else {"ref/top/ids": array("uint32", about.n)}
    return ids | {
        "ref/top/logp": array(about.dtype, about.n),
        "ref/top/rest": array(about.dtype),
    }


def raw_bytes(meta: dict[str, Any]) -> int:
    """Size of a store before compression."""
    return sum(array_bytes(meta).values())


def array_bytes(meta: dict[str, Any]) -> dict[str, int]:
    """Size of every array before compression. Padding takes hardly any space, and is left out."""
    if rows := meta.get("distribution_rows"):
        meta = meta | {"distribution_rows": rows | {"padded": rows["scored"]}}
    return {name: array.bytes for name, array in array_schema(meta).items()}
