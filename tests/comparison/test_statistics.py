"""Differences between runs: against scipy and statsmodels, and their rate of false alarms."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t, ttest_rel
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from fpocli.comparison.statistics import compare_means, compare_shares, mcnemar


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_that_of_statsmodels(seed, pairs):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 2, (2, pairs)).astype(float)
    table = [
        [((one == a) & (other == b)).sum() for b in (1, 0)]
        for a in (1, 0)
    ]  # fmt: skip
    expected = statsmodels_mcnemar(table, exact=True).pvalue
    assert mcnemar(one, other) == pytest.approx(min(expected, 1.0), abs=1e-12)


def test_ties_count_for_neither_side():
    one, other = np.array([1, 1, 0.5, 0.5, 0]), np.array([1, 0.5, 0.5, 1, 0])
    assert mcnemar(one, other) == 1.0
    assert compare_shares(one[None], other[None]).mean == 0


def test_the_interval_of_one_seed_excludes_zero_as_a_t_test_does():
    """On many pairs a bootstrap and the paired t-test agree."""
    rng = np.random.default_rng(3)
    for shift in (0.05, 0.1, 0.15, 0.3):
        one, other = rng.normal(shift, 1, (1, 400)), rng.normal(0, 1, (1, 400))
        found = compare_means(one, other)
        expected = ttest_rel(one[0], other[0]).confidence_interval()
        assert found.mean == pytest.approx((one - other).mean())
        assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_the_variance_of_several_seeds_is_that_of_the_two_way_layout():
    """Mean squares by statsmodels' analysis of variance, with seeds and pairs as random effects."""
    rng = np.random.default_rng(5)
    gaps = rng.normal(0, 1, (4, 30)) + rng.normal(0, 0.5, (4, 1)) + rng.normal(0, 1, (1, 30))
    found = compare_means(gaps, np.zeros_like(gaps))
    seed, pair = np.meshgrid(range(4), range(30), indexing="ij")
    frame = pd.DataFrame({"gap": gaps.ravel(), "seed": seed.ravel(), "pair": pair.ravel()})
    table = anova_lm(ols("gap ~ C(seed) + C(pair)", frame).fit())
    squares = (table["sum_sq"] / table["df"]).tolist()
    total = squares[0] + squares[1] - squares[2]
    degrees = total**2 / sum(s**2 / d for s, d in zip(squares, table["df"], strict=True))
    half = t.ppf(0.975, degrees) * np.sqrt(total / gaps.size)
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half))


@pytest.mark.parametrize("of_seeds", [0.0, 0.08, 0.25])
def test_equal_methods_with_three_seeds_differ_about_once_in_twenty(of_seeds):
    """Whether pairs (0.1 over 100 of them) or seeds make most of the noise; rather less often where
    both make about as much."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(500):
        gaps = rng.normal(0, of_seeds, (3, 1)) + rng.normal(0, 1, (3, 100))
        alarms += compare_means(gaps, np.zeros_like(gaps)).beyond_noise
    assert 0.005 <= alarms / 500 <= 0.09


def test_few_pairs_tell_nothing():
    found = compare_means(np.ones((1, 19)) + np.arange(19) / 100, np.zeros((1, 19)))
    assert found.low > 0 and not found.enough_pairs and not found.beyond_noise


def test_equal_measurements_have_no_interval_at_all():
    for seeds in (1, 3):
        found = compare_means(np.ones((seeds, 40)), np.ones((seeds, 40)))
        assert (found.mean, found.low, found.high) == (0, 0, 0) and not found.beyond_noise


def test_equal_runs_differ_beyond_noise_about_once_in_twenty():
    """200 comparisons of runs with the same distribution, on 100 pairs."""
    rng = np.random.default_rng(0)
    alarms = sum(
        compare_means(*rng.normal(0, 1, (2, 1, 100))).beyond_noise for _ in range(200)
    )  # 5 % are 10; 4 to 20 have a chance of 98 %.
    assert 3 <= alarms <= 22


def test_a_difference_of_the_seeds_is_noise_and_one_of_all_seeds_is_not():
    """Three seeds whose runs differ by much more than their pairs: the pairs alone would say that
    the difference is certain."""
    rng = np.random.default_rng(0)
    pairs = rng.normal(0, 0.1, (3, 400))
    other = rng.normal(0, 0.1, (3, 400))
    shifts = np.array([[1.0], [-1.0], [0.6]])
    assert not compare_means(pairs + shifts, other).beyond_noise
    assert compare_means(pairs[:1] + 0.6, other[:1]).beyond_noise
    found = compare_shares((pairs + 0.3 > 0).astype(float), (other > 0).astype(float))
    assert found.beyond_noise and found.p_value is None, "several seeds have no McNemar test"


def test_pairing_finds_what_separate_samples_hide():
    """Pairs differ much more among each other than runs do on the same pair."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 200)
    one = difficulty + rng.normal(0.3, 0.5, 200)
    other = difficulty + rng.normal(0, 0.5, 200)
    assert compare_means(one[None], other[None]).beyond_noise
    assert not compare_means(one[None], rng.permutation(other)[None]).beyond_noise


def test_a_share_needs_both_the_interval_and_the_test():
    """Five pairs of 30 in favour: the interval excludes 0, and the exact test does not."""
    one = np.zeros((1, 30))
    one[0, :5] = 1
    found = compare_shares(one, np.zeros((1, 30)))
    assert found.low > 0 and found.p_value == pytest.approx(2 / 2**5)
    assert not found.beyond_noise
