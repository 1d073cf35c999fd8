"""The values of a block before it is scored: all missing, in the dtypes of its store.

Shapes: b pairs, K stored features, M scored positions, n tokens of a distribution.
"""

from typing import Any

import numpy as np

from fpocli.data.top_tokens import TopTokens
from fpocli.features.top_features import TopFeatures
from fpocli.store.records import ReferenceValues
from fpocli.store.schema import ArraySchema, array_schema, kept_features


def missing_values(meta: dict[str, Any], b: int) -> ReferenceValues:
    """Reference values of b pairs, all missing, to be filled.

    Args:
        meta: the attributes of the store.
        b: number of pairs.
    """
    arrays = array_schema(meta)
    features = {}
    for site, about in meta["sites"].items():
        index, value, nonzero = (
            _rows(f"features/{site}/{name}", arrays, b) for name in ("index", "value", "nonzero")
        )
        kept = np.array(kept_features(about), np.int64)
        kept_value = np.full((b, 2, len(kept)), np.nan, value.dtype)
        features[site] = TopFeatures(index, value, nonzero, kept_value, kept)
    return ReferenceValues(_rows("ref/logp", arrays, b), _rows("ref/margin", arrays, b), features)


def missing_distributions(meta: dict[str, Any], positions: int) -> TopTokens[np.ndarray] | None:
    """Distributions at M scored positions, all missing, to be filled; None in a store without.

    Args:
        meta: the attributes of the store.
        positions: M.
    """
    if "distributions" not in meta:
        return None
    arrays = array_schema(meta)
    names = [f"ref/top/{name}" for name in TopTokens._fields]
    parts: Any = [_rows(name, arrays, positions) if name in arrays else None for name in names]
    return TopTokens(*parts)


def _rows(name: str, arrays: dict[str, ArraySchema], count: int) -> np.ndarray:
    array = arrays[name]
    return np.full((count, *array.shape[1:]), array.fill(name), array.dtype)
