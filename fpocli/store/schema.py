"""The arrays and attributes of a store, as docs/format.md defines them. Reads and writes nothing.

Shapes: N pairs, T tokens, K stored features, F features that are stored for every response,
m features of a site, b pairs of a block, B blocks; of next-token distributions R rows, n tokens.
"""

import hashlib
import json
import math
import re
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from fpocli.store.distribution_rows import Distributions

FORMAT, VERSION = "fpo-store", "1.2"
STATES = ("tokenised", "partial", "complete")
TOKENS_PER_CHUNK = 2**18
# A chunk is read into memory whole.
_LARGEST_CHUNK = 2**31
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


# -- attributes, checked before they are used ------------------------------------------------------

_SITE = re.compile(r"layer_(\d+)\.(resid_post|mlp_out)")
_TEXT = (str, NoneType)
# Types of the attributes; an empty object may hold anything.
_ATTRIBUTES: dict[str, Any] = {
    "state": str,
    "created": str,
    "writer": {},
    "block": int,
    "tokens": int,
    "pairs": {"read": int, "kept": int, "dropped": {}},
    "data": {"source": str, "split": _TEXT, "revision": _TEXT, "fingerprint": str},
    "tokenizer": {
        "source": str,
        "revision": _TEXT,
        "vocabulary": str,
        "chat_template": {"name": str, "text": str},
    },
    "limits": {"max_length": int, "max_prompt_length": int},
    "model": {
        "source": str,
        "revision": _TEXT,
        "architecture": str,
        "hash": str,
        "dtype": str,
        "attention": str,
    },
    "sites": {},
    "fingerprint": str,
}
_SITE_ATTRIBUTES: dict[str, Any] = {
    "layer": int,
    "kind": str,
    "sae": {"source": str, "architecture": str, "hash": str},
    "d_sae": int,
    "k": int,
    "value_dtype": str,
}
_ROWS = ("scored", "padded", "chunk", "shard")
_DISTRIBUTION_ATTRIBUTES: dict[str, Any] = {
    "distributions": {"n": int, "dtype": str, "vocabulary": int},
    "distribution_rows": dict.fromkeys(_ROWS, int),
}


def wrong_attribute(meta: dict[str, Any]) -> str | None:
    """What is wrong with a store's attributes, in words, or None.

    It limits every size that memory is allocated by later, and names that become paths.
    """
    if wrong := _wrong_kind(meta, _ATTRIBUTES):
        return f"{wrong} is missing or of the wrong type"
    if meta["state"] not in STATES:
        return f"the state {meta['state']} is unknown"
    pairs, block, tokens = meta["pairs"]["kept"], meta["block"], meta["tokens"]
    for place in meta.get("paths", {}).values() if isinstance(meta.get("paths", {}), dict) else [0]:
        if not isinstance(place, dict) or _wrong_kind(place, {"absolute": str, "relative": str}):
            return "paths is not an object of absolute and relative paths"
    if not (pairs >= 1 and block >= 1 and tokens >= 3 * pairs):
        return f"{pairs} pairs in blocks of {block} cannot be of {tokens} tokens"
    gaps = meta["pairs"].get("not_finite", [])
    if not (
        isinstance(gaps, list)
        and all(type(pair) is int and 0 <= pair < pairs for pair in gaps)
        and gaps == sorted(set(gaps))
        and len(gaps) < pairs
    ):
        return "pairs.not_finite are no numbers of pairs"
    allowed = meta.get("allowed", {})
    lists = list(allowed.values()) if isinstance(allowed, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in lists):
        return "allowed are no lists of names"
    named = meta.get("neuronpedia", {})
    if not isinstance(named, dict) or set(map(type, named.values())) - {str}:
        return "neuronpedia are no names by site"
    documents = meta.get("documents", {})
    if not isinstance(documents, dict) or set(map(type, documents.values())) - {str}:
        return "documents are no sums"
    for site, about in meta["sites"].items():
        if wrong := _wrong_site(site, about):
            return f"sites.{site}: {wrong}"
    if wrong := _wrong_distributions(meta):
        return wrong
    for name, array in array_schema(meta).items():
        if array.file_bytes > _LARGEST_CHUNK:
            return f"a chunk of {name} would take {array.file_bytes:,} bytes, at most 2 GiB may"
    return None if meta["fingerprint"] == fingerprint(meta) else "fingerprint is not of the rest"


def _wrong_site(site: str, about: Any) -> str | None:
    if wrong := _wrong_kind({site: about}, {site: _SITE_ATTRIBUTES}):
        return f"{wrong} is missing or of the wrong type"
    named, k, m = _SITE.fullmatch(site), about["k"], about["d_sae"]
    if not named or (about["layer"], about["kind"]) != (int(named[1]), named[2]):
        return "it is no site"
    if not 1 <= k <= m <= 2**32 - 1:
        return f"k {k} and d_sae {m} cannot be"
    keep = kept_features(about)
    if not (
        isinstance(keep, list)
        and all(type(feature) is int and 0 <= feature < m for feature in keep)
        and keep == sorted(set(keep))
    ):
        return "keep are no features"
    if about["value_dtype"] not in ("float32", "float16"):
        return f"the dtype {about['value_dtype']} is unknown"
    return None


def _wrong_distributions(meta: dict[str, Any]) -> str | None:
    if "distributions" not in meta:
        return None
    if wrong := _wrong_kind(meta, _DISTRIBUTION_ATTRIBUTES):
        return f"{wrong} is missing or of the wrong type"
    n, dtype, vocabulary = (meta["distributions"][name] for name in Distributions._fields)
    if dtype not in ("float32", "float16"):
        return f"the dtype {dtype} is unknown"
    if not 1 <= n <= vocabulary <= 2**32 - 1:
        return f"distributions of {n} of {vocabulary} tokens cannot be"
    scored, padded, chunk, shard = (meta["distribution_rows"][name] for name in _ROWS)
    pairs, blocks = meta["pairs"]["kept"], -(-meta["pairs"]["kept"] // meta["block"])
    if not (
        2 * pairs <= scored <= meta["tokens"] - pairs
        and chunk >= 1
        and shard >= 1
        and shard % chunk == 0
        and padded % shard == 0
        and scored <= padded < scored + blocks * shard
    ):
        return "distribution_rows do not match the pairs"
    return None


def _wrong_kind(there: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The name of the first value of another type."""
    for name, kind in expected.items():
        value = there.get(name)
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                return name
            if wrong := _wrong_kind(value, kind):
                return f"{name}.{wrong}"
        # True is an int in Python.
        elif not isinstance(value, kind) or isinstance(value, bool):
            return name
    return None
