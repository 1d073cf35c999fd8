"""What a store holds of b pairs, in memory: token ids and reference values.

Shapes: b pairs, K stored features, m features of a site. Column 0 is chosen, column 1 rejected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self

import numpy as np

from fpocli.data.dropped import place_in_data
from fpocli.data.pairs import TokenPair
from fpocli.features.top_features import Array, TopFeatures


@dataclass(frozen=True)
class FeatureTotals:
    """Sums over the 2b responses of a block, from which mean and frequency are computed.

    Args:
        value: float64 [m], sum of the pooled vectors.
        frequency: int64 [2, m], number of chosen / rejected responses with the feature > 0.
    """

    value: np.ndarray
    frequency: np.ndarray


@dataclass(frozen=True)
class ReferenceValues(Generic[Array]):
    """The reference's values of b pairs: arrays of a block, or tensors of a packed sequence.

    Args:
        logp: float32 [b, 2], S_ref in nats.
        margin: float32 [b], a_ref(chosen) - a_ref(rejected), nats per token.
        features: by site.
    """

    logp: Array
    margin: Array
    features: dict[str, TopFeatures[Array]]


@dataclass(frozen=True)
class TokenPairs:
    """The token ids of b pairs.

    Args:
        ids: uint32, pair after pair: prompt, chosen, rejected.
        spans: int64 [b, 4], start of prompt, of chosen, of rejected and end, as offsets into ids.
        source_row: int64 [b].
        source: uint16 [b], which source of a mixture; None without one.
    """

    ids: np.ndarray
    spans: np.ndarray
    source_row: np.ndarray
    source: np.ndarray | None = None

    @classmethod
    def of(cls, pairs: Sequence[TokenPair]) -> Self:
        """The token ids of pairs, in order, as of one source."""
        runs = [run for pair in pairs for run in (pair.prompt, pair.chosen, pair.rejected)]
        ends = np.cumsum([len(run) for run in runs]).reshape(-1, 3)
        starts = np.concatenate([[0], ends[:-1, 2]])
        return cls(
            ids=np.concatenate([np.asarray(run, np.uint32) for run in runs]),
            spans=np.column_stack([starts, ends]),
            source_row=np.array([pair.row for pair in pairs], np.int64),
        )

    def __len__(self) -> int:
        return len(self.spans)

    def pair(self, number: int) -> TokenPair:
        """The token ids of one of the b pairs."""
        a, b, c, d = self.spans[number].tolist()
        ids = self.ids
        source = 0 if self.source is None else int(self.source[number])
        return TokenPair(ids[a:b], ids[b:c], ids[c:d], int(self.source_row[number]), source)

    def place(self, number: int) -> str:
        """Where a pair is in the data, in words."""
        source = None if self.source is None else int(self.source[number])
        return place_in_data(int(self.source_row[number]), source)

    @property
    def counts(self) -> np.ndarray:
        """n of chosen and rejected: int64 [b, 2]."""
        return np.diff(self.spans[:, 1:])
