"""What a store must look like: its arrays and its attributes. Nothing here reads or writes.

Shapes: N pairs, T tokens, K kept features, m features of a site,
b pairs of a block, B blocks.
"""

import hashlib
import json
import math
import re
from typing import Any, NamedTuple

import numpy as np

FORMAT, VERSION = "fpo-store", "1.1"
STATES = ("tokenised", "partial", "complete")
TOKENS_PER_CHUNK = 2**18
# A chunk is held in memory whole.
_LARGEST_CHUNK = 2**31
# What determines the content, and what a fingerprint names.
_IDENTITY = ("data", "tokenizer", "limits", "model", "sites", "block")


class Layout(NamedTuple):
    """Shape, dtype and chunks of an array."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the array, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk, uncompressed."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    def fill(self, name: str) -> Any:
        """What a gap holds: never what could be read as a value."""
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return np.nan
        if name.endswith("/index"):
            return int(np.iinfo(kind).max)
        return -1 if name.endswith(("/nonzero", "/frequency")) else 0


def index_dtype(m: int) -> str:
    """The dtype of feature indices: its largest value must stay free for unused slots."""
    return "uint16" if m <= 65_535 else "uint32"


def fingerprint(meta: dict[str, Any]) -> str:
    """sha256 of all that determines a store's content."""
    identity = {name: meta[name] for name in _IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def layout(meta: dict[str, Any]) -> dict[str, Layout]:
    """Shape, dtype and chunks of every array of a store with these attributes.

    No chunk with rows of pairs spans two blocks.
    """
    n, block = meta["pairs"]["kept"], meta["block"]
    blocks = -(-n // block)
    arrays = {
        "tokens": Layout((meta["tokens"],), "uint32", (TOKENS_PER_CHUNK,)),
        "spans": Layout((n, 4), "int64", (block, 4)),
        "source_row": Layout((n,), "int64", (block,)),
        "ref/logp": Layout((n, 2), "float32", (block, 2)),
        "ref/margin": Layout((n,), "float32", (block,)),
        "blocks/digest": Layout((blocks,), "uint64", (1,)),
    }
    for site, about in meta["sites"].items():
        k, m = about["k"], about["d_sae"]
        features, parts = f"features/{site}", f"blocks/{site}"
        arrays |= {
            f"{features}/index": Layout((n, 2, k), index_dtype(m), (block, 2, k)),
            f"{features}/value": Layout((n, 2, k), about["value_dtype"], (block, 2, k)),
            f"{features}/nonzero": Layout((n, 2), "int32", (block, 2)),
            f"{features}/mean": Layout((m,), "float32", (m,)),
            f"{features}/frequency": Layout((2, m), "int64", (2, m)),
            f"{parts}/sum": Layout((blocks, m), "float64", (1, m)),
            f"{parts}/frequency": Layout((blocks, 2, m), "int64", (1, 2, m)),
        }
    return arrays


def raw_bytes(meta: dict[str, Any]) -> int:
    """Size of a store before compression."""
    return sum(array.bytes for array in layout(meta).values())


# -- what a store says of itself, before anything is believed --------------------------------------

_SITE = re.compile(r"layer_(\d+)\.(resid_post|mlp_out)")


def wrong_attribute(meta: dict[str, Any]) -> str | None:
    """What is wrong with a store's attributes, in words; None where nothing is.

    It bounds every size by which memory is taken later, and names that become paths.
    """
    if meta.get("state") not in STATES:
        return "state is unknown"
    kinds = {
        "block": int,
        "tokens": int,
        "created": str,
        "fingerprint": str,
        **dict.fromkeys(("pairs", "data", "tokenizer", "limits", "model", "sites", "writer"), dict),
    }
    for name, kind in kinds.items():
        if not _is(meta.get(name), kind):
            return f"{name} is missing or wrong"
    required: dict[str, dict[str, type]] = {
        "pairs": {"read": int, "kept": int, "dropped": dict},
        "data": {"source": str, "fingerprint": str},
        "tokenizer": {"source": str, "vocabulary": str, "chat_template": dict},
        "limits": {"max_length": int, "max_prompt_length": int},
        "model": {"source": str, "hash": str, "dtype": str, "attention": str},
    }
    for part, fields in required.items():
        for name, kind in fields.items():
            if not _is(meta[part].get(name), kind):
                return f"{part}.{name} is missing or wrong"
    if not _is(meta["tokenizer"]["chat_template"].get("text"), str):
        return "tokenizer.chat_template.text is missing or wrong"
    pairs, block, tokens = meta["pairs"]["kept"], meta["block"], meta["tokens"]
    if not (pairs >= 1 and block >= 1 and tokens >= 3 * pairs):
        return f"{pairs} pairs in blocks of {block} cannot be of {tokens} tokens"
    not_finite = meta["pairs"].get("not_finite", [])
    if not (_is(not_finite, list) and all(_is(i, int) and 0 <= i < pairs for i in not_finite)):
        return "pairs.not_finite names no pairs of the store"
    documents = meta.get("documents", {})
    if not (_is(documents, dict) and all(_is(value, str) for value in documents.values())):
        return "documents are no sums"
    for site, about in meta["sites"].items():
        if wrong := _wrong_site(site, about):
            return f"sites.{site}: {wrong}"
    for name, array in layout(meta).items():
        if array.chunk_bytes > _LARGEST_CHUNK:
            return f"a chunk of {name} would take {array.chunk_bytes:,} bytes, at most 2 GiB may"
    return None if meta["fingerprint"] == fingerprint(meta) else "fingerprint is not of the rest"


def _wrong_site(site: str, about: Any) -> str | None:
    named = _SITE.fullmatch(site)
    if not (named and _is(about, dict) and about.get("layer") == int(named[1])):
        return "is no site"
    k, m, sae = about.get("k"), about.get("d_sae"), about.get("sae")
    if not (_is(k, int) and _is(m, int) and 1 <= k <= m <= 2**32 - 1):
        return f"k {k} and d_sae {m} cannot be"
    if about.get("value_dtype") not in ("float32", "float16"):
        return "value_dtype is unknown"
    if not (_is(sae, dict) and all(_is(sae.get(name), str) for name in ("source", "hash"))):
        return "sae is missing or wrong"
    return None


def _is(value: Any, kind: type) -> bool:
    """isinstance, where true is no number."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
