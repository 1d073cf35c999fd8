"""Rounding decides no comparison; a tie counts one half."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpocli.scoring.accuracy import wins

arrays = pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])


@arrays
def test_higher_lower_and_equal(make):
    found = wins(make([2.0, 1.0, 3.0]), make([1.0, 2.0, 3.0]), make([3.0, 3.0, 6.0]))
    assert found.value.tolist() == [1, 0, 0.5]
    assert found.tie.tolist() == [False, False, True]


@given(st.integers(0, 10**6), st.integers(2, 2000))
def test_two_sums_of_the_same_numbers_are_a_tie_in_any_order(seed, count):
    """A float32 sum over tokens, in an order that a kernel may choose: a log-probability."""
    tokens = np.random.default_rng(seed).gamma(2, 1, (2, count)).astype(np.float32)
    tokens = torch.from_numpy(-tokens)
    reference, policy = tokens.sum(1), tokens.flip(1).cumsum(1)[:, -1]
    rewards = policy - reference
    size = (policy.abs() + reference.abs()).sum()
    assert wins(rewards[0], rewards[1], size).value == 0.5


@arrays
def test_a_difference_of_a_thousandth_of_a_nat_is_not_a_tie(make):
    """The rewards are made of four sums of 100 nats; one training step changes more than this."""
    found = wins(make([0.001]), make([0.0]), make([4 * 100.0]))
    assert found.value.tolist() == [1]
