"""Packed rows against their definition."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpocli.batches import CHOSEN, PROMPT, REJECTED, Batch, group, pack
from fpocli.tokens import TokenPair

runs = st.lists(st.integers(1, 200), min_size=1, max_size=7).map(np.array)
pairs = st.lists(st.builds(TokenPair, runs, runs, runs), min_size=1, max_size=4)


@given(pairs)
def test_predictors_and_targets_are_those_of_the_separate_sequences(pairs):
    """In the sequence prompt + response, the token at position t - 1 predicts the one at t."""
    batch = pack(pairs)
    responses = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
    assert batch.counts == [len(response) for _, response in responses]
    ids, positions = batch.ids.flatten(), batch.positions.flatten()
    groups = zip(
        batch.predictors.split(batch.counts), batch.targets.split(batch.counts), strict=True
    )
    for (prompt, response), (predictors, targets) in zip(responses, groups, strict=True):
        sequence = np.concatenate([prompt, response])
        assert targets.tolist() == response.tolist()
        assert positions[predictors].tolist() == list(range(len(prompt) - 1, len(sequence) - 1))
        assert ids[predictors].tolist() == sequence[len(prompt) - 1 : -1].tolist()


@given(pairs, st.sampled_from([None, 1, 3]))
def test_a_slot_sees_exactly_the_tokens_before_it_in_its_own_sequence(pairs, window):
    batch = pack(pairs)
    allowed = batch.attends(window)
    for row, pair in enumerate(pairs):
        starts = np.cumsum([0, len(pair.prompt), len(pair.chosen), len(pair.rejected)])
        for kind, run in enumerate((pair.prompt, pair.chosen, pair.rejected)):
            for offset in range(len(run)):
                slot = starts[kind] + offset
                own = list(range(starts[kind], slot + 1))
                sequence = own if kind == PROMPT else [*range(starts[0], starts[1]), *own]
                seen = sequence[-window:] if window else sequence
                assert allowed[row, slot].nonzero().flatten().tolist() == seen


def test_pairs_of_one_row_do_not_see_each_other():
    """The rule itself already serves rows of many pairs."""
    run = torch.tensor([[PROMPT, CHOSEN, REJECTED, PROMPT, CHOSEN, REJECTED]])
    batch = Batch(
        ids=torch.zeros(1, 6, dtype=torch.int64),
        positions=torch.tensor([[0, 1, 1, 0, 1, 1]]),
        pair=torch.tensor([[0, 0, 0, 1, 1, 1]]),
        run=run,
        predictors=torch.empty(0),
        targets=torch.empty(0),
        counts=[],
    )
    block = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    assert torch.equal(batch.attends()[0].int(), torch.block_diag(block, block))


def test_padding_sees_itself_alone():
    short = TokenPair(np.array([1]), np.array([2]), np.array([3]))
    long = TokenPair(np.array([1, 1]), np.array([2, 2]), np.array([3, 3]))
    batch = pack([short, long])
    assert torch.equal(batch.attends()[0, 3:], torch.eye(6, dtype=torch.bool)[3:])
    assert batch.pair[0].tolist() == [0, 0, 0, -1, -1, -1]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100))
def test_groups_hold_every_pair_once_and_fit_their_slots(lengths, slots):
    groups = list(group(np.array(lengths), slots))
    assert sorted(pair for members in groups for pair in members) == list(range(len(lengths)))
    for members in groups:
        assert len(members) == 1 or len(members) * max(lengths[i] for i in members) <= slots
