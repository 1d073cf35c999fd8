"""The sign-flip test, its correction, the effect size, and the difference at equal style."""

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.sparse import csr_array
from scipy.stats import norm, ttest_1samp
from statsmodels.stats.multitest import multipletests

from fpocli.interpretation.equal_style import EqualStyle
from fpocli.interpretation.paired_test import (
    BENTKUS,
    PairedSums,
    correct,
    effect_size,
    sign_flip_p,
)

RATE = 0.05


def responses(rng, pairs, features, tail=1.5):
    """Values [2, pairs, features] of exchangeable responses: of all frequencies from 1 % to 100 %,
    with tails of any weight, and in groups of five that fire together."""
    groups = features // 5
    frequency = np.repeat(np.geomspace(0.01, 1, groups), 5)
    together = np.repeat(rng.random((2, pairs, groups)), 5, axis=2)
    scale = np.repeat(rng.lognormal(0, tail, (2, pairs, groups)), 5, axis=2)
    return (together < frequency) * scale * rng.lognormal(0, 0.3, (2, pairs, features))


def summed(chosen, rejected, block=1000):
    sums = PairedSums(chosen.shape[1])
    for start in range(0, len(chosen), block):
        rows = slice(start, start + block)
        sums.add(csr_array(chosen[rows]), csr_array(rejected[rows]))
    return sums


def test_sums_are_those_of_a_loop_for_every_block_size():
    chosen, rejected = responses(np.random.default_rng(0), 50, 20)
    for block in (1, 7, 50):
        sums = summed(chosen, rejected, block)
        assert sums.pairs == 50
        for f in range(20):
            d = [float(c) - float(r) for c, r in zip(chosen[:, f], rejected[:, f], strict=True)]
            expected = [sum(x**power for x in d) for power in (1, 2, 3, 4)]
            np.testing.assert_allclose(sums.powers[:, f], expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(sums.chosen[f], sum(chosen[:, f]), rtol=1e-12)
            np.testing.assert_allclose(sums.rejected[f], sum(rejected[:, f]), rtol=1e-12)


def exact_p(d):
    """The two-sided p value of the sign-flip test, from all 2^n signs, for each of their sums."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(d))))
    totals = np.sort(np.abs(signs @ d))
    # Equal sums may differ in the last bits.
    below = np.searchsorted(totals, totals * (1 - 1e-9))
    return totals, 1 - below / len(totals)


@pytest.mark.parametrize("n", range(1, 13))
def test_p_is_never_below_that_of_all_sign_flips(n):
    rng = np.random.default_rng(n)
    weights = [np.ones(n), np.arange(1, n + 1), np.r_[10, np.ones(n - 1)]]
    weights += [rng.random(n), rng.lognormal(0, 3, n), rng.standard_t(2, n)]
    for d in weights:
        totals, exact = exact_p(d)
        bound = sign_flip_p(totals, np.full_like(totals, (d**2).sum()))
        assert (bound >= exact * (1 - 1e-8)).all()


def test_the_constant_cannot_be_smaller():
    """Two equal differences have the sum sqrt(2) sd with probability 1/4 on each side."""
    assert abs(BENTKUS - 3.178) < 1e-3
    assert sign_flip_p(np.array(2.0), np.array(2.0)) == pytest.approx(0.5, abs=1e-12)


def test_a_feature_without_differences_is_not_tested():
    total, squares = np.array([0.0, 9.0, 0.0]), np.array([0.0, 9.0, 2.0])
    p = sign_flip_p(total, squares)
    np.testing.assert_allclose(p, [1, 2 * BENTKUS * norm.sf(3), 1])
    q = correct(p, squares > 0)
    np.testing.assert_allclose(q, [1, 2 * p[1], 1])
    assert (correct(p, np.zeros(3, bool)) == 1).all()


def test_correction_is_that_of_statsmodels():
    p = np.random.default_rng(0).random(200) ** 3
    np.testing.assert_allclose(
        correct(p, np.ones(200, bool)), multipletests(p, method="fdr_bh")[1], rtol=1e-12
    )


def found(total, squares):
    """What is found in each of several data sets: bool [sets, features]."""
    p = sign_flip_p(total, squares)
    return np.array([correct(row, squares > 0) for row in p]) <= RATE


@pytest.mark.parametrize("tail", [0.3, 1.5])
def test_of_1000_sets_without_a_difference_few_have_a_finding(tail):
    """Chosen and rejected are swapped at random in each pair, in 50 ways for each of 20 sets."""
    rng = np.random.default_rng(0)
    findings, uncorrected = [], []
    for _ in range(20):
        chosen, rejected = responses(rng, 200, 200, tail)
        d = chosen - rejected
        swapped = rng.choice([-1, 1], (50, 200)) @ d
        squares = (d**2).sum(0)
        findings += found(swapped, squares).any(1).tolist()
        uncorrected += (sign_flip_p(swapped, squares) <= RATE).any(1).tolist()
    assert len(findings) == 1000
    assert np.mean(findings) <= RATE
    # The sets are no trivial ones: without the correction many would have a finding.
    assert np.mean(uncorrected) > 0.2


def test_planted_differences_are_found_and_few_others():
    """Of 200 features 20 are switched off in 60 % of the rejected responses."""
    rng = np.random.default_rng(1)
    false, power = [], []
    for _ in range(20):
        chosen, rejected = responses(rng, 400, 200, tail=0.5)
        d = rng.choice([-1, 1], (50, 400, 1)) * (chosen - rejected)
        planted = rng.choice(np.arange(100, 200), 20, replace=False)
        for one in d:
            flipped = rejected[:, planted] * (rng.random((400, 20)) > 0.6)
            one[:, planted] = chosen[:, planted] - flipped
            hits = found(one.sum(0)[None], (one**2).sum(0))[0]
            false.append((hits.sum() - hits[planted].sum()) / max(1, hits.sum()))
            power.append(hits[planted].mean())
    assert len(false) == 1000
    assert np.mean(false) <= RATE
    assert np.mean(power) >= 0.8


def test_effect_size_is_that_of_the_differences():
    chosen, rejected = responses(np.random.default_rng(0), 80, 40)
    rejected[:, 3] = chosen[:, 3] - 1  # the same difference in all pairs
    rejected[:, 4] = chosen[:, 4] = 0
    d = chosen - rejected
    effect, interval = effect_size(summed(chosen, rejected))
    some = d.std(0) > 1e-9
    assert np.isnan(effect[~some]).all() and np.isnan(interval[:, ~some]).all()
    assert not some[[3, 4]].any() and some.sum() > 30
    d = d[:, some]
    np.testing.assert_allclose(effect[some], d.mean(0) / d.std(0, ddof=1), rtol=1e-9)
    t = ttest_1samp(d, 0).statistic
    np.testing.assert_allclose(effect[some] * np.sqrt(80), t, rtol=1e-9)
    assert ((interval[0] < effect) & (effect < interval[1]))[some].all()


@pytest.mark.parametrize(("kind", "least"), [("normal", 0.94), ("skewed", 0.92), ("sparse", 0.89)])
def test_intervals_of_the_effect_cover_it(kind, least):
    """About 95 % of the intervals, from 200 pairs each, contain the true effect; fewer if the
    feature seldom fires."""
    rng = np.random.default_rng(0)
    shape = 200, 2000
    if kind == "normal":
        d, effect = rng.normal(0.5, 1, shape), 0.5
    elif kind == "skewed":
        d, effect = rng.exponential(1, shape), 1
    else:
        # Fires in 20 % of chosen and 5 % of rejected responses, with exponential values.
        d = (rng.random(shape) < 0.2) * rng.exponential(1, shape)
        d -= (rng.random(shape) < 0.05) * rng.exponential(1, shape)
        effect = 0.15 / np.sqrt(2 * 0.25 - 0.2**2 - 0.05**2)
    _, (low, high) = effect_size(summed(np.maximum(d, 0), np.maximum(-d, 0)))
    assert least <= ((low <= effect) & (effect <= high)).mean() <= 0.965


def regression(style, d, block=7):
    fit = EqualStyle(style, d.shape[1])
    for start in range(0, len(d), block):
        fit.add(csr_array(d[start : start + block]))
    return fit.result()


@pytest.mark.parametrize("block", [1, 7, 60])
def test_equal_style_is_that_of_statsmodels(block):
    rng = np.random.default_rng(0)
    chosen, rejected = responses(rng, 60, 20)
    d = chosen - rejected
    style = np.column_stack([rng.normal(20, 300, 60), rng.poisson(1, 60)])
    left, interval = regression(style, d, block)
    for f in range(20):
        fit = sm.OLS(d[:, f], sm.add_constant(style)).fit(cov_type="HC1", use_t=True)
        np.testing.assert_allclose(left[f], fit.params[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(interval[:, f], fit.conf_int()[0], rtol=1e-7, atol=1e-9)


def test_equal_style_leaves_out_what_cannot_be_told_apart():
    """A constant measure, and one that is a multiple of another, change nothing."""
    rng = np.random.default_rng(0)
    length, d = rng.normal(size=(40, 1)), rng.normal(size=(40, 5))
    alone = regression(length, d)
    several = regression(np.column_stack([length, np.full(40, 3), 2 * length]), d)
    for one, other in zip(alone, several, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_a_difference_that_is_only_length_vanishes():
    rng = np.random.default_rng(0)
    length = rng.normal(50, 100, (500, 1))
    d = 0.01 * length + rng.normal(0, 0.1, (500, 1))
    left, (low, high) = regression(length, d)
    assert d.mean() > 0.4
    assert low[0] < 0 < high[0] and abs(left[0]) < 0.02


def test_as_many_measures_as_pairs_leave_no_interval():
    rng = np.random.default_rng(0)
    _, interval = regression(rng.normal(size=(4, 3)), rng.normal(size=(4, 2)))
    assert np.isnan(interval).all()
