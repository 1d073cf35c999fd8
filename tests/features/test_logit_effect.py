"""Weights of the features by their effect on the logits, against whole matrices in float64."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import cache_config

from fpocli import Store, cache
from fpocli.features.logit_effect import logit_effect
from fpocli.features.pretrained import load_decoder
from fpocli.model.final_norm import final_norm
from fpocli.scoring.logit_weights import logit_weights, token_counts
from fpocli.system.errors import UserError


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 9), st.integers(1, 12))
def test_it_is_the_variance_of_the_change_of_the_logits(seed, v, d, m):
    draw = torch.Generator().manual_seed(seed)
    head, decoder, gain = (torch.randn(*shape, generator=draw) for shape in ((v, d), (m, d), (d,)))
    tokens = torch.randint(0, 5, (v,), generator=draw)
    tokens[0] += 1
    tokens[-1] += 1
    changes = (decoder * gain).double() @ head.double().T
    share = tokens.double() / tokens.sum()
    effects = ((changes - changes @ share[:, None]) ** 2) @ share
    omega = logit_effect(head, gain, decoder, tokens, centred=False)
    assert torch.allclose(omega.double(), effects / effects.mean(), rtol=1e-4, atol=1e-5)
    # Bias-like directions of the head shift all logits alike, which no distribution sees.
    shifted = logit_effect(
        head + torch.randn(d, generator=draw), gain, decoder, tokens, centred=False
    )
    assert torch.allclose(shifted, omega, rtol=1e-2, atol=1e-3)


def test_it_is_the_second_order_term_of_the_kl():
    """Where all positions have the distribution that the tokens are counted from."""
    torch.manual_seed(0)
    head, decoder = torch.randn(40, 6).double(), torch.randn(5, 6).double()
    logits = head @ torch.randn(6).double()
    p = logits.softmax(0)
    small = 1e-3
    kls = torch.stack(
        [
            (p * (logits.log_softmax(0) - (logits + small * head @ row).log_softmax(0))).sum()
            for row in decoder
        ]
    )
    omega = logit_effect(head, torch.ones(6), decoder, p, centred=False)
    assert torch.allclose(omega.double(), kls / kls.mean(), rtol=2e-3)


@pytest.mark.parametrize("centred", [False, True])
def test_it_is_the_second_order_term_through_a_norm_of_fixed_division(centred):
    """LayerNorm removes the mean of what a feature adds: a row along ones then has no effect."""
    torch.manual_seed(1)
    head, gain = torch.randn(40, 6).double(), torch.randn(6).double()
    decoder = torch.cat([torch.randn(4, 6), torch.ones(1, 6)]).double()
    state = torch.randn(6).double()
    moved = decoder - decoder.mean(1, keepdim=True) if centred else decoder
    p = (head @ (gain * state)).softmax(0)
    changes = (moved * gain) @ head.T
    expected = ((changes - changes @ p[:, None]) ** 2) @ p
    omega = logit_effect(head, gain, decoder, p, centred=centred)
    assert torch.allclose(omega.double(), expected / expected.mean(), rtol=1e-4, atol=1e-7)
    assert (omega[-1] < 1e-6) == centred


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gain_of_a_final_norm(family):
    """Gemma multiplies by 1 + weight, Llama by weight."""
    network = tiny.network(family)
    weight = network.model.norm.weight
    expected = weight if family == "llama" else 1 + weight
    norm = final_norm(network)
    assert torch.allclose(norm.gain, expected, atol=1e-5) and not norm.centred


def test_a_layer_norm_has_a_gain_and_a_bias():
    from transformers import AutoModelForCausalLM, GPT2Config

    network = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    norm = network.transformer.ln_f
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.bias.copy_(torch.randn(8))
    found = final_norm(network)
    assert torch.allclose(found.gain, norm.weight, atol=1e-4) and found.centred
    del network.transformer.ln_f
    with pytest.raises(UserError, match="has no final norm"):
        final_norm(network)


@pytest.mark.parametrize("most", [1, 100, 10**9])
def test_a_stores_first_tokens_are_counted(store_path, monkeypatch, most):
    monkeypatch.setattr("fpocli.scoring.logit_weights._TOKENS", most)
    store = Store.open(store_path)
    ids = store.read_array("tokens")[:most]
    assert torch.equal(token_counts(store, 300), torch.from_numpy(np.bincount(ids, minlength=300)))


def test_the_weights_of_a_store(material, tmp_path):
    store = cache(cache_config(material, tmp_path / "ref.zarr"))
    network = tiny.network("gemma2")
    (site,) = store.sites
    weights = logit_weights({site: str(material / "sae")}, network, token_counts(store, 300))[site]
    assert store.blocks > 1
    ids = np.concatenate([store.tokens(block).ids for block in range(store.blocks)])
    counts = torch.bincount(torch.from_numpy(ids.astype("int64")), minlength=300)
    decoder = load_decoder(str(material / "sae"), torch.device("cpu"))
    expected = logit_effect(
        network.lm_head.weight, final_norm(network).gain, decoder, counts, centred=False
    )
    assert torch.equal(weights.weight, expected)
    assert weights.weight.mean().item() == pytest.approx(1, rel=1e-5)
    assert len(weights.named) == 0 and not weights.direction.any()
