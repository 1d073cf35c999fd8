"""Paired differences of many features at once: a sign-flip test, its correction, an effect size.

Pair i and feature f have the difference d_if of chosen minus rejected. Everything here is made from
sums over pairs, which are added block by block, so memory does not grow with N.

Shapes: N pairs, b pairs of a block, m features.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, norm, t

# The smallest c for which P(S >= x) <= c P(normal >= x) holds, with equality for two equal weights
# at x = sqrt(2).
BENTKUS = 1 / (4 * norm.sf(np.sqrt(2)))
LEVEL = 0.95
_HIGHEST_POWER = 4


@dataclass
class PairedSums:
    """Sums over pairs.

    Args:
        features: m.
        pairs: N, so far.
        chosen, rejected: float64 [m], sums of the values of each side.
        powers: float64 [4, m], sums of d, d^2, d^3 and d^4.
    """

    features: int
    pairs: int = 0
    chosen: np.ndarray = field(init=False)
    rejected: np.ndarray = field(init=False)
    powers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.chosen, self.rejected = np.zeros((2, self.features))
        self.powers = np.zeros((_HIGHEST_POWER, self.features))

    def add(self, chosen: csr_array, rejected: csr_array) -> Self:
        """Add the pairs of a block: float64 [b, m] of each side."""
        self.pairs += chosen.shape[0]
        self.chosen += chosen.sum(0)
        self.rejected += rejected.sum(0)
        difference = chosen - rejected
        for power in range(_HIGHEST_POWER):
            self.powers[power] += difference.power(power + 1).sum(0)
        return self

    @property
    def difference(self) -> np.ndarray:
        """Mean of d: float64 [m]."""
        return self.powers[0] / self.pairs


def sign_flip_p(total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """An upper bound of the two-sided p value of the sign-flip test.

    If chosen and rejected are exchangeable within each pair, then given all |d| the signs are fair
    coins, and the sum S of d is a weighted sum of Rademacher variables. Bentkus and Dzindzalieta
    (2015, "A tight Gaussian bound for weighted sums of Rademacher random variables", Bernoulli
    21(2), theorem 1.1): P(S >= x sqrt(sum of d^2)) <= c P(normal >= x), with c = 1 / (4 P(normal >=
    sqrt 2)), about 3.178, for every number of pairs and every d. Both sides count here.

    Args:
        total: S, any shape.
        squares: sum of d^2, of the same shape.

    Returns:
        float64; 1 where all d are 0.
    """
    x = np.abs(total) / np.sqrt(np.where(squares > 0, squares, np.inf))
    return np.minimum(1, 2 * BENTKUS * norm.sf(x))


def correct(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's q: the smallest rate at which a feature is among those found.

    Args:
        p: float64 [m].
        tested: bool [m]; the others count neither as tests nor as findings.

    Returns:
        float64 [m]; 1 where not tested.
    """
    q = np.ones_like(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested])
    return q


def effect_size(sums: PairedSums) -> tuple[np.ndarray, np.ndarray]:
    """The standardised mean difference of pairs, mean(d) / sd(d), with a 95 % interval.

    The variance of this ratio is (1 - g e + (k - 1) e^2 / 4) / N up to terms of order 1 / N^2, with
    e the ratio, g the skewness of d and k its kurtosis; normal d, g = 0 and k = 3, give the known
    (1 + e^2 / 2) / N. (Mertens 2002 and, with higher terms, Bao 2009, who call it Sharpe ratio.)
    Differences of sparse features are far from normal. The quantile is Student's, N - 1 degrees.

    Of the intervals from 200 simulated pairs, 95 % contain the true effect for normal d, 91 % if
    the feature fires in 20 % of chosen and 5 % of rejected responses, 87 % with 5 % and 1 %.

    Args:
        sums: over at least 2 pairs.

    Returns:
        effect, float64 [m], and its interval, [2, m]; NaN where all d are equal.
    """
    n = sums.pairs
    mean, second, third, fourth = sums.powers / n
    variance = second - mean**2
    # What is left after cancellation is no variance.
    spread = np.sqrt(np.where(variance > 1e-12 * second, variance, np.nan))
    skewness = (third - 3 * mean * second + 2 * mean**3) / spread**3
    kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / spread**4
    effect = mean / spread * np.sqrt((n - 1) / n)
    error = np.sqrt(np.maximum(0, 1 - skewness * effect + (kurtosis - 1) * effect**2 / 4) / n)
    return effect, effect + student(n - 1) * error * np.array([[-1], [1]])


def student(freedom: int) -> float:
    """The quantile of Student's distribution that a 95 % interval uses."""
    return float(t.ppf((1 + LEVEL) / 2, freedom))
