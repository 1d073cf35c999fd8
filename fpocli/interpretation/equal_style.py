"""The difference that is left between responses of equal length and style.

Per feature, d (chosen minus rejected) is regressed by ordinary least squares on the differences of
the style measures, with an intercept; the intercept is the difference at equal style. Movva et al.
control for the difference of lengths in this way (WIMHF, arXiv 2510.26202), Chatbot Arena for
length and markdown ("Does style matter?", lmsys.org, 2024).

Shapes: N pairs, b pairs of a block, m features, c style measures, r rank of the regression.
"""

import numpy as np
from scipy.sparse import csr_array

from fpocli.interpretation.paired_test import student


class EqualStyle:
    """The regression of every feature's differences on the same style differences.

    It is given all style differences first, then the features' differences block by block, of which
    it keeps sums.
    """

    def __init__(self, style: np.ndarray, features: int) -> None:
        """
        Args:
            style: float64 [N, c], differences of chosen minus rejected.
            features: m.
        """
        # A constant column cannot be told from the intercept, which then includes it.
        varies = np.ptp(style, axis=0) > 0
        design = np.column_stack([np.ones(len(style)), style[:, varies] / style[:, varies].std(0)])
        basis, sizes, directions = np.linalg.svd(design, full_matrices=False)
        kept = sizes > sizes[0] * len(style) * np.finfo(float).eps
        self._basis = basis[:, kept]
        # The intercept is the sum of share_i d_i.
        self._share = self._basis @ (directions[kept, 0] / sizes[kept])
        self._freedom = len(style) - int(kept.sum())
        self._read = 0
        rank = self._basis.shape[1]
        self._fit, self._weighted_fit = np.zeros((2, features, rank))
        self._intercept, self._weighted_squares = np.zeros((2, features))

    def add(self, difference: csr_array) -> None:
        """Add the pairs of a block, in the order of the style differences: float64 [b, m]."""
        rows = slice(self._read, self._read + difference.shape[0])
        self._read = rows.stop
        basis, share = self._basis[rows], self._share[rows]
        self._fit += difference.T @ basis
        self._weighted_fit += difference.T @ (share[:, None] ** 2 * basis)
        self._intercept += difference.T @ share
        self._weighted_squares += difference.power(2).T @ share**2

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The difference at equal style and its 95 % interval: float64 [m] and [2, m].

        The standard error is White's, with N / (N - r) (HC1): the spread of d grows with the
        difference of lengths. NaN if N = r.
        """
        if self._freedom == 0:
            return self._intercept, np.full((2, len(self._intercept)), np.nan)
        # The sum of share_i^2 e_i^2, with e = d - basis fit the residuals, multiplied out.
        between = self._basis.T @ (self._share[:, None] ** 2 * self._basis)
        squares = (
            self._weighted_squares
            - 2 * (self._fit * self._weighted_fit).sum(1)
            + ((self._fit @ between) * self._fit).sum(1)
        )
        correction = len(self._basis) / self._freedom
        error = np.sqrt(np.maximum(0, squares) * correction)
        return self._intercept, self._intercept + student(self._freedom) * error * np.array(
            [[-1], [1]]
        )
