"""The content of stores that no model made: M features of a site, of which K are stored."""

import numpy as np

from fpocli.features.top_features import TopFeatures
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs

SITE = "layer_3.resid_post"
M, K = 12, 5


def attributes_of(pairs: int, block: int) -> dict:
    """The metadata of a store."""
    sae = {"source": "sae", "architecture": "jumprelu", "hash": "0"}
    about = {"layer": 3, "kind": "resid_post", "sae": sae, "k": K, "d_sae": M}
    return {
        "writer": {},
        "pairs": {"read": pairs, "kept": pairs, "dropped": {}},
        "data": {"source": "pairs.jsonl", "split": None, "revision": None, "fingerprint": "0"},
        "tokenizer": {
            "source": "model",
            "revision": None,
            "vocabulary": "0",
            "chat_template": {"name": "none", "text": ""},
        },
        "limits": {"max_length": 99, "max_prompt_length": 99},
        "model": {
            "source": "model",
            "revision": None,
            "architecture": "none",
            "hash": "0",
            "dtype": "float32",
            "attention": "eager",
        },
        "sites": {SITE: about | {"value_dtype": "float32"}},
        "block": block,
    }


def made_up(pairs: int, seed: int) -> tuple[TokenPairs, list]:
    """Token ids and, for every pair, reference values and pooled features."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, (pairs, 3))
    ends = lengths.cumsum().reshape(-1, 3)
    spans = np.column_stack([np.concatenate([[0], ends[:-1, 2]]), ends])
    tokens = TokenPairs(
        rng.integers(0, 9, lengths.sum()).astype(np.uint32), spans, np.arange(pairs) * 2
    )
    return tokens, [rng.random((2, M)) for _ in range(pairs)]


def rows_of(vectors: list, rows: slice) -> tuple[ReferenceValues, dict[str, FeatureTotals]]:
    pooled = np.stack(vectors[rows]).astype(np.float32)
    index = np.argsort(-pooled, axis=-1, kind="stable")[..., :K]
    features = TopFeatures(
        index.astype(np.uint16),
        np.take_along_axis(pooled, index, -1),
        (pooled > 0).sum(-1).astype(np.int32),
        np.empty((len(pooled), 2, 0), np.float32),
        np.empty(0, np.int64),
    )
    totals = FeatureTotals(pooled.sum((0, 1), dtype=np.float64), (pooled > 0).sum(0))
    logp = pooled[..., 0].copy()
    return ReferenceValues(logp, logp[:, 0] - logp[:, 1], {SITE: features}), {SITE: totals}
