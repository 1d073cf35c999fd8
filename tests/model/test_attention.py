"""The attention rule against its definition, and both kernels against the rule."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import pairs, random_pairs

from fpocli.model import attention
from fpocli.model.attention import (
    BY_SEQUENCE,
    FLEX,
    attend_by_sequence,
    attention_mask,
    attention_rule,
)
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.scoring.score import score


def dense(batch, window=None):
    """The rule as a table, query by key."""
    slots = torch.arange(len(batch.ids))
    return attention_rule(batch, window)(None, None, slots[:, None], slots[None])


@given(pairs, st.sampled_from([None, 1, 3]), st.sampled_from([1, 8]))
def test_a_token_attends_to_exactly_the_tokens_before_it_in_its_sequence(pairs, window, multiple):
    batch = pack(pairs, multiple)
    allowed = dense(batch, window)
    for start, chosen, rejected, end in batch.spans.tolist():
        prompt = list(range(start, chosen))
        for first, last, before in (
            (start, chosen, []),
            (chosen, rejected, prompt),
            (rejected, end, prompt),
        ):
            for slot in range(first, last):
                sequence = [*before, *range(first, slot + 1)]
                seen = sequence[-window:] if window else sequence
                assert allowed[slot].nonzero().flatten().tolist() == seen
    padding = range(batch.spans[-1, 3], len(batch.ids))
    assert all(allowed[slot].nonzero().flatten().tolist() == [slot] for slot in padding)


@settings(max_examples=30)
@given(
    pairs,
    st.sampled_from([None, 1, 4]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.integers(0, 10**6),
)
def test_attention_by_sequence_is_dense_attention_under_the_rule(
    pairs, window, softcap, heads, seed
):
    """Values and gradients in float64."""
    torch.manual_seed(seed)
    batch, (groups, keys) = pack(pairs), heads
    shapes = [(1, count, len(batch.ids), 4) for count in (groups, keys, keys)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    band = attention_mask(batch, window, BY_SEQUENCE, torch.float64)
    actual, _ = attend_by_sequence(
        torch.nn.Module(), *inputs, band, scaling=0.3, spans=batch.spans, softcap=softcap
    )
    query, key, value = inputs
    key, value = (part.repeat_interleave(groups // keys, 1) for part in (key, value))
    scores = 0.3 * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~dense(batch, window), -torch.inf).softmax(-1)
    expected = (weights @ value).transpose(1, 2)
    assert torch.allclose(actual, expected, atol=1e-12)
    slope = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, slope),
        torch.autograd.grad(expected, inputs, slope),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flex_attention_gives_the_same_scores(family, monkeypatch):
    """On a CPU without a compiler torch runs flex_attention step by step, and forward only. It is
    the same mask, the same soft-cap and the same call as on a GPU."""
    network = tiny.network(family)
    pairs = random_pairs(6, most=30)
    with torch.inference_mode():
        expected = score(LanguageModel(network, []), {}, pack(pairs)).logp
        monkeypatch.setattr("fpocli.model.language_model.choose_kernel", lambda device: FLEX)
        with torch.compiler.set_stance("force_eager"):
            actual = score(LanguageModel(network, []), {}, pack(pairs, attention.FLEX_BLOCK)).logp
    assert torch.allclose(actual, expected, atol=5e-5)
