"""Rows of a store in memory: tokens, reference, features of b pairs.

Shapes: b pairs, K kept features, m features of a site. Column 0 is chosen, column 1 rejected.
"""

from dataclasses import dataclass

import numpy as np

from fpocli.data.pair_tokenizer import TokenPair


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
        a, b, c, d = self.spans[number].tolist()
        ids = self.ids
        return TokenPair(ids[a:b], ids[b:c], ids[c:d], int(self.source_row[number]))

    @property
    def counts(self) -> np.ndarray:
        """n of chosen and rejected: int64 [b, 2]."""
        return np.diff(self.spans[:, 1:])
