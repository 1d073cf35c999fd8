"""The order and the shares of several sources."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fpocli.data.mixture import mixed
from fpocli.data.sources import split_weight

WEIGHTS = st.lists(st.integers(1, 60), min_size=2, max_size=4)


def endless(number):
    while True:
        yield number


@given(WEIGHTS)
def test_every_beginning_has_the_shares_of_the_weights(weights):
    taken = Counter()
    pairs = mixed([endless(number) for number in range(len(weights))], weights)
    for count, number in zip(range(1, 200), pairs, strict=False):
        taken[number] += 1
        for other, weight in enumerate(weights):
            # To within a pair, except for rounding among more than two (Webster's method).
            assert abs(taken[other] - count * weight / sum(weights)) < 1.5


@given(WEIGHTS)
def test_a_period_of_the_mixture_has_exactly_the_weights(weights):
    period = sum(weights) // math.gcd(*weights)
    pairs = mixed([endless(number) for number in range(len(weights))], weights)
    found = Counter(next(pairs) for _ in range(period))
    assert [found[i] for i in range(len(weights))] == [w // math.gcd(*weights) for w in weights]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_weighted_by_their_sizes_all_pairs_are_used_in_their_order(sizes):
    streams = [[(number, place) for place in range(size)] for number, size in enumerate(sizes)]
    found = list(mixed(streams, sizes))
    assert sorted(found) == [pair for stream in streams for pair in stream]
    assert [sorted(found, key=lambda pair: pair[0])] == [sorted(found)]


def test_the_first_source_without_a_next_pair_ends_the_mixture():
    assert "".join(mixed(["aaa", "bbbbbbbbb"], [1, 2])) == "babbabbabb"


def test_a_weight_is_the_number_after_the_last_colon(tmp_path):
    assert split_weight("a.jsonl:2") == ("a.jsonl", 2.0)
    assert split_weight("owner/name@v1:0.25") == ("owner/name@v1", 0.25)
    for whole in ("a.jsonl", "a:b", ":2", "a:-1", "a:nan", "a:1e3"):
        assert split_weight(whole) == (whole, None)
    path = tmp_path / "a:2"
    path.write_text("")
    assert split_weight(str(path)) == (str(path), None)
