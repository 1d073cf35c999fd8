"""Which differences between runs are beyond noise, on the same held-out pairs.

Two runs are compared pair by pair. With one seed, the interval of a mean is a bootstrap over
pairs, and a share has McNemar's exact test as well. With several seeds, seeds are clusters, since
all pairs of a seed share one training: the interval is that of a mean over seeds and pairs, both
drawn at random. (A bootstrap over three seeds would call 13 to 17 % of equal methods different.)

Shapes: S seeds, N pairs.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest, bootstrap, t

# With fewer pairs no interval can be trusted.
FEWEST_PAIRS = 20
_DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of a run and the baseline.

    Args:
        mean: of the differences.
        low, high: a 95 % interval of it.
        seeds, pairs: S and N.
        p_value: of McNemar's exact test; None for means and for several seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int
    pairs: int
    p_value: float | None = None

    @property
    def enough_pairs(self) -> bool:
        """Whether there are enough pairs to tell."""
        return self.pairs >= FEWEST_PAIRS

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside the interval and, where there is a test, p is below 0.05."""
        outside = self.low > 0 or self.high < 0
        certain = self.p_value is None or self.p_value < 1 - _LEVEL
        return self.enough_pairs and outside and certain


def compare_means(one: np.ndarray, other: np.ndarray) -> Difference:
    """The mean difference of two measurements of the same pairs.

    Args:
        one, other: [S, N], seeds and pairs in the same order.
    """
    gaps = one - other
    low, high = _bootstrap_interval(gaps[0]) if len(gaps) == 1 else _random_effects_interval(gaps)
    return Difference(float(gaps.mean()), low, high, *gaps.shape)


def compare_shares(one: np.ndarray, other: np.ndarray) -> Difference:
    """The difference of two shares of the same pairs.

    Args:
        one, other: [S, N], 1 where the pair counts, 0 where not, one half for a tie.
    """
    found = compare_means(one, other)
    if len(one) > 1:
        return found
    return replace(found, p_value=mcnemar(one[0], other[0]))


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


def _bootstrap_interval(gaps: np.ndarray) -> tuple[float, float]:
    """scipy's bias-corrected and accelerated bootstrap of the mean of [N]."""
    if np.ptp(gaps) == 0:
        return float(gaps[0]), float(gaps[0])
    # In batches, for its jackknife would take N^2 numbers.
    found = bootstrap(
        (gaps,), np.mean, n_resamples=_DRAWS, batch=100, confidence_level=_LEVEL,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _random_effects_interval(gaps: np.ndarray) -> tuple[float, float]:
    """The interval of the mean of [S, N] with random effects of seeds and of pairs: the variance
    from the mean squares of the two-way layout, the degrees of freedom by Satterthwaite."""
    seeds, pairs = gaps.shape
    mean, of_seeds, of_pairs = gaps.mean(), gaps.mean(1, keepdims=True), gaps.mean(0)
    squares = np.array(
        [
            pairs * ((of_seeds - mean) ** 2).sum(),
            seeds * ((of_pairs - mean) ** 2).sum(),
            ((gaps - of_seeds - of_pairs + mean) ** 2).sum(),
        ]
    )
    freedom = np.array([seeds - 1, pairs - 1, (seeds - 1) * (pairs - 1)])
    if not squares.any():
        return float(mean), float(mean)
    # With one pair there is nothing to estimate their variance from.
    parts = squares / np.maximum(freedom, 1)
    # Estimates of variances can come out negative; this one is at least that of a single source.
    total = max(parts[0] + parts[1] - parts[2], *parts[:2])
    degrees = total**2 / (parts**2 / np.maximum(freedom, 1)).sum()
    half = t.ppf((1 + _LEVEL) / 2, degrees) * np.sqrt(total / (seeds * pairs))
    return float(mean - half), float(mean + half)
