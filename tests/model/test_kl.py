"""The sequential KL against the whole vocabulary's, by plain transformers on separate sequences."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import Largest, naive_kl, random_pairs

from fpocli.features.site import Site
from fpocli.model import head
from fpocli.model.language_model import FrozenReference, LanguageModel
from fpocli.model.packing import pack, plan_packing
from fpocli.scoring.score import score

SITE = Site(1, "resid_post")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kl_and_its_gradient_equal_the_whole_vocabularys(family, monkeypatch):
    """float32, random pairs in packed sequences: K within 1e-4 of it, gradients within 1e-4 of the
    largest."""
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 7)
    network, other = (tiny.network(family, seed) for seed in (0, 1))
    policy, reference = LanguageModel(network, []), FrozenReference(other, [])
    weights = [
        network.model.layers[0].self_attn.k_proj.weight,
        network.get_output_embeddings().weight,
    ]

    @settings(max_examples=10, database=None)
    @given(st.integers(1, 5), st.integers(0, 10**6), st.integers(1, 90))
    def check(count, seed, budget):
        pairs = random_pairs(count, seed, 14)
        for row in plan_packing([len(pair) for pair in pairs], budget):
            batch = pack([pairs[i] for i in row])
            actual = score(policy, {}, batch, reference(batch)).kl
            expected = torch.stack(
                [
                    naive_kl(network, other, pairs[i].prompt, response)
                    for i in row
                    for response in (pairs[i].chosen, pairs[i].rejected)
                ]
            ).view(-1, 2)
            assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-5)
            slope = torch.linspace(-1, 1, actual.numel()).view_as(actual)
            own = torch.autograd.grad((slope * actual).sum(), weights)
            naive = torch.autograd.grad((slope * expected).sum(), weights)
            for one, two in zip(own, naive, strict=True):
                # Where a token attends to one key only, the keys' gradient is pure rounding.
                assert (one - two).abs().max() <= 1e-4 * two.abs().max() + 1e-7

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_exactly_0_where_the_policy_is_the_reference(dtype):
    policy = LanguageModel(tiny.network("gemma2", dtype=dtype), [])
    reference = FrozenReference(tiny.network("gemma2", dtype=dtype), [])
    batch = pack(random_pairs(5))
    assert (score(policy, {}, batch, reference(batch)).kl == 0).all()


def test_log_probabilities_do_not_change_with_the_reference():
    policy = LanguageModel(tiny.network("gemma2"), [SITE])
    reference = FrozenReference(tiny.network("gemma2", 1), [SITE])
    batch = pack(random_pairs(5))
    expected = reference(batch)
    alone, beside = score(policy, {}, batch), score(policy, {}, batch, expected)
    assert alone.kl is None
    assert torch.equal(alone.logp, beside.logp)
    assert not expected.final.requires_grad and expected.states[str(SITE)].shape[1] == tiny.WIDTH


def test_no_tensor_of_all_positions_by_vocabulary_exists(monkeypatch):
    """Forward and backward through both heads."""
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 4)
    policy, reference = LanguageModel(tiny.network("llama"), []), tiny.network("llama", 1)
    reference = FrozenReference(reference, [])
    batch = pack(random_pairs(6, most=20))
    with Largest() as seen:
        scores = score(policy, {}, batch, reference(batch))
        (scores.logp.sum() + scores.kl.sum()).backward()
    # tiny.WIDTH rows are the head's own transposed weight and its gradient.
    assert len(batch.targets) > 60
    assert seen.rows <= tiny.WIDTH
