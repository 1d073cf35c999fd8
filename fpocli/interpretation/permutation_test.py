"""Which features are larger in one set of texts than in another: rank sums against permutations.

Shapes: R texts of the first set, B of the second, m features.
"""

import numpy as np
from scipy.stats import rankdata

# The smallest p-value is 1 / (1 + this).
PERMUTATIONS = 1000
_FEATURES_AT_ONCE = 4096


def larger_p(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The chance that, among all features, some rank sum is as large as this one if the texts of
    both sets are of one kind.

    Under that assumption the texts can be exchanged. So their labels are permuted, and every
    feature's rank sum, divided by its standard deviation over permutations, is compared with the
    largest one of all features (Westfall and Young's single-step maxT). This needs no distribution,
    however few texts there are and however seldom a feature fires, and holds for dependent
    features and for any choice among them.

    Args:
        first: [R, m].
        second: [B, m].

    Returns:
        float64 [m], one-sided and corrected for all features.
    """
    texts = len(first) + len(second)
    rng = np.random.default_rng(0)
    labels = np.zeros((1 + PERMUTATIONS, texts), np.float32)
    labels[0, : len(first)] = 1
    for row in labels[1:]:
        row[rng.permutation(texts)[: len(first)]] = 1
    largest = np.full(PERMUTATIONS, -np.inf)
    observed = np.full(first.shape[1], -np.inf)
    for begin in range(0, first.shape[1], _FEATURES_AT_ONCE):
        part = slice(begin, begin + _FEATURES_AT_ONCE)
        ranks = rankdata(np.concatenate([first[:, part], second[:, part]]), axis=0)
        centred = ranks - ranks.mean(0)
        spread = np.sqrt((centred**2).sum(0))
        varies = spread > 0
        if not varies.any():
            continue
        sums = labels @ (centred[:, varies] / spread[varies]).astype(np.float32)
        observed[part][varies] = sums[0]
        largest = np.maximum(largest, sums[1:].max(1))
    # A permutation that leaves the sets as they are counts, whatever its rounding.
    above = len(largest) - np.searchsorted(np.sort(largest), observed - 1e-5)
    return (1 + above) / (1 + PERMUTATIONS)
