"""Checks the attributes of a store before they are used (docs/format.md, Attributes)."""

import re
from types import NoneType
from typing import Any

from fpocli.store.distribution_rows import Distributions
from fpocli.store.schema import array_schema, fingerprint, kept_features

STATES = ("tokenised", "partial", "complete")
# A chunk is read into memory whole.
_LARGEST_CHUNK = 2**31
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
_SOURCE_ATTRIBUTES = {"source": str, "split": _TEXT, "revision": _TEXT, "fingerprint": str}
_IMPORTED = {"imported": {"source": str, "fingerprint": str, "reduction": str}}
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
    if not all(type(count) is int for count in meta["pairs"]["dropped"].values()):
        return "pairs.dropped are no counts"
    gaps = meta["pairs"].get("not_finite", [])
    if not (
        isinstance(gaps, list)
        and all(type(pair) is int and 0 <= pair < pairs for pair in gaps)
        and gaps == sorted(set(gaps))
        and len(gaps) < pairs
    ):
        return "pairs.not_finite are no numbers of pairs"
    if wrong := _wrong_sources(meta):
        return wrong
    allowed = meta.get("allowed", {})
    lists = list(allowed.values()) if isinstance(allowed, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in lists):
        return "allowed are no lists of names"
    if (bits := meta["model"].get("quantization", "nf4")) != "nf4":
        return f"the quantisation {bits} is unknown"
    named = meta.get("neuronpedia", {})
    if not isinstance(named, dict) or set(map(type, named.values())) - {str}:
        return "neuronpedia are no names by site"
    documents = meta.get("documents", {})
    if not isinstance(documents, dict) or set(map(type, documents.values())) - {str}:
        return "documents are no sums"
    for site, about in meta["sites"].items():
        if wrong := _wrong_site(site, about):
            return f"sites.{site}: {wrong}"
    if "imported" in meta["model"] and (wrong := _wrong_kind(meta["model"], _IMPORTED)):
        return f"model.{wrong} is missing or of the wrong type"
    if wrong := _wrong_distributions(meta):
        return wrong
    for name, array in array_schema(meta).items():
        if array.file_bytes > _LARGEST_CHUNK:
            return f"a chunk of {name} would take {array.file_bytes:,} bytes, at most 2 GiB may"
    return None if meta["fingerprint"] == fingerprint(meta) else "fingerprint is not of the rest"


def _wrong_sources(meta: dict[str, Any]) -> str | None:
    """Of a mixture: its sources, and how many pairs are of each."""
    about, sources = meta["pairs"].get("sources"), meta["data"].get("sources", [])
    if about is None and sources == []:
        return None
    if not isinstance(sources, list) or any(
        not isinstance(one, dict) or _wrong_kind(one, _SOURCE_ATTRIBUTES) for one in sources
    ):
        return "data.sources are no sources"
    if not isinstance(about, dict) or _wrong_kind(about, {"kept": list, "hash": str}):
        return "pairs.sources is missing or of the wrong type"
    kept = about["kept"]
    if not (
        2 <= len(kept) == len(sources) <= 2**16
        and all(type(count) is int and count >= 0 for count in kept)
        and sum(kept) == meta["pairs"]["kept"]
    ):
        return "pairs.sources do not match data.sources"
    weights = [one.get("weight", 1.0) for one in sources]
    if not all(type(weight) in (int, float) and weight > 0 for weight in weights):
        return "a weight of data.sources is no number above 0"
    return None


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
