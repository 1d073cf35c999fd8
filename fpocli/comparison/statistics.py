"""Which differences between runs are beyond noise, on the same held-out pairs.

Two runs are compared pair by pair. Pairs, and seeds where there are several, are drawn again with
replacement (a bootstrap): seeds are clusters, since all pairs of a seed share one training. For
shares of a single seed there is McNemar's exact test as well.

Shapes: S seeds, N pairs.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

_DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of a run and the baseline.

    Args:
        mean: of the differences.
        low, high: a 95 % interval of it.
        p_value: of McNemar's exact test; None for means and for several seeds.
    """

    mean: float
    low: float
    high: float
    p_value: float | None = None

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside the interval and, where there is a test, p is below 0.05."""
        outside = self.low > 0 or self.high < 0
        return outside and (self.p_value is None or self.p_value < 1 - _LEVEL)


def compare_means(one: np.ndarray, other: np.ndarray) -> Difference:
    """The mean difference of two measurements of the same pairs.

    Args:
        one, other: [S, N], seeds and pairs in the same order.
    """
    gaps = one - other
    seeds, pairs = gaps.shape
    rng = np.random.default_rng(0)
    means = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        # All seeds were measured on the same pairs, so these are drawn once for all.
        drawn = gaps[:, rng.integers(pairs, size=pairs)].mean(1)
        means[draw] = drawn[rng.integers(seeds, size=seeds)].mean()
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(float(gaps.mean()), float(low), float(high))


def compare_shares(one: np.ndarray, other: np.ndarray) -> Difference:
    """The difference of two shares of the same pairs.

    Args:
        one, other: [S, N], 1 where the pair counts, 0 where not, one half for a tie.
    """
    found = compare_means(one, other)
    if len(one) > 1:
        return found
    return Difference(found.mean, found.low, found.high, mcnemar(one[0], other[0]))


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """The p value of McNemar's exact test: of the pairs that count for one and not for the other,
    each side is equally likely to have one.

    Args:
        one, other: [N], 0, one half or 1.
    """
    better, worse = int((one > other).sum()), int((one < other).sum())
    if better + worse == 0:
        return 1.0
    return float(binomtest(better, better + worse).pvalue)
