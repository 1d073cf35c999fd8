"""Packed sequences against their definition."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import pairs

from fpocli.data.pairs import TokenPair
from fpocli.model.packing import pack, plan_packing

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(pairs, st.sampled_from([1, 16]))
def test_predictors_and_targets_are_those_of_the_separate_sequences(pairs, multiple):
    """In the sequence prompt + response, the token at position t - 1 predicts the one at t."""
    batch = pack(pairs, multiple)
    responses = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
    assert batch.counts == [len(response) for _, response in responses]
    groups = zip(
        batch.predictors.split(batch.counts), batch.targets.split(batch.counts), strict=True
    )
    for (prompt, response), (predictors, targets) in zip(responses, groups, strict=True):
        sequence = np.concatenate([prompt, response])
        assert targets.tolist() == response.tolist()
        assert batch.positions[predictors].tolist() == [*range(len(prompt) - 1, len(sequence) - 1)]
        assert batch.ids[predictors].tolist() == sequence[len(prompt) - 1 : -1].tolist()


@given(pairs, st.sampled_from([1, 16]))
def test_every_token_is_packed_with_its_position(pairs, multiple):
    batch = pack(pairs, multiple)
    assert len(batch.ids) % multiple == 0 and len(batch.ids) - batch.spans[-1, 3] < multiple
    start = 0
    for pair, span in zip(pairs, batch.spans.tolist(), strict=True):
        assert span[0] == start
        first = 0
        for run, begin, end in zip(
            (pair.prompt, pair.chosen, pair.rejected), span, span[1:], strict=False
        ):
            assert batch.ids[begin:end].tolist() == run.tolist()
            assert batch.positions[begin:end].tolist() == [*range(first, first + len(run))]
            first = len(pair.prompt)
        start = span[3]


@given(lengths, st.integers(1, 100), st.integers(1, 5))
def test_every_pair_is_packed_once_within_the_budget(lengths, budget, ranks):
    rows = plan_packing(lengths, budget, ranks)
    assert sorted(pair for row in rows for pair in row) == list(range(len(lengths)))
    assert len(rows) % ranks == 0
    totals = [sum(lengths[pair] for pair in row) for row in rows]
    assert totals == sorted(totals, reverse=True), "the longest row comes first"
    assert max(totals) <= max(budget, *lengths)
    assert all(totals) or len(lengths) < len(rows)


def test_packing_wastes_under_three_percent_on_lengths_like_ultrafeedback():
    """Prompts of about 150 tokens and responses of about 300, log-normal with a long tail, cut at
    2,048 together: a block of 1,024 pairs in rows of 8,192."""
    rng = np.random.default_rng(0)
    prompt = np.minimum(rng.lognormal(4.6, 1.0, 1024), 1024).astype(int) + 8
    chosen, rejected = (
        np.minimum(rng.lognormal(5.5, 0.8, 1024).astype(int) + 2, 2048 - prompt) for _ in range(2)
    )
    lengths = (prompt + chosen + rejected).tolist()
    for budget in (4096, 8192):
        rows = plan_packing(lengths, budget)
        assert sum(lengths) / (len(rows) * budget) > 0.97


def test_ranks_get_packed_sequences_of_similar_length():
    lengths = np.random.default_rng(0).integers(50, 900, 64).tolist()
    rows = plan_packing(lengths, 8192, 8)
    totals = [sum(lengths[pair] for pair in row) for row in rows]
    assert len(rows) == 8
    assert min(totals) > 0.97 * max(totals)


def test_with_fewer_pairs_than_ranks_some_ranks_get_none():
    assert plan_packing([5, 9], 100, 4) == [[1], [0], [], []]


def test_a_packed_sequence_moves_to_a_device_with_all_its_tensors():
    pair = TokenPair(np.array([1, 2]), np.array([3]), np.array([4]))
    moved = pack([pair]).to(torch.device("meta"))
    assert {t.device.type for t in (moved.ids, moved.positions, moved.targets)} == {"meta"}
    assert moved.counts == [1, 1]
