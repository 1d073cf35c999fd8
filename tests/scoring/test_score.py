"""Scores against plain transformers and sae-lens, on each sequence by itself.

Invariants are numbered in docs/method.md.
"""

import copy

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import Largest, random_pairs
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from fpocli.data.pairs import TokenPair
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model import head
from fpocli.model.attention import check_attention
from fpocli.model.language_model import LanguageModel
from fpocli.model.network import check_layers
from fpocli.model.packing import pack, plan_packing
from fpocli.scoring.score import score
from fpocli.system.errors import UserError

SITES = [Site(layer, kind) for layer in (1, tiny.LAYERS - 1) for kind in ("resid_post", "mlp_out")]


def apart(network, prompt, response):
    """S and the site states of one sequence, by plain transformers.

    resid_post is taken as what the next module reads, mlp_out as the difference it makes to the
    residual stream, so neither depends on the hooks under test.
    """
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    layers = network.model.layers
    seen = {}

    def read(name):
        def hook(module, inputs):
            seen[name] = inputs[0]

        return hook

    hooks = []
    for site in SITES:
        after = network.model.norm if site.layer == tiny.LAYERS - 1 else layers[site.layer + 1]
        # The last norm before the MLP reads the residual stream as it is without the MLP.
        layer = layers[site.layer]
        before = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        hooks += [
            (after if after is network.model.norm else after.input_layernorm)
            .register_forward_pre_hook(read(("after", site.layer))),
            before.register_forward_pre_hook(read(("before", site.layer))),
        ]  # fmt: skip
    with torch.no_grad(), tiny.plain(network):
        logits = network(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    predictors = slice(len(prompt) - 1, ids.shape[1] - 1)
    picked = logits.float().log_softmax(-1)[0, predictors].gather(-1, ids[0, len(prompt) :, None])
    states = {}
    for site in SITES:
        state = seen["after", site.layer]
        if site.kind == "mlp_out":
            state = state - seen["before", site.layer]
        states[str(site)] = state[0, predictors]
    return picked.sum(), states


@pytest.fixture(params=tiny.FAMILIES, scope="module")
def network(request):
    return tiny.network(request.param)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_scores_equal_those_of_the_two_separate_sequences(network, architecture):
    """Invariants 3, 5 and 6: within 1e-4 nats per sequence; features by sae-lens's encode."""
    pairs = random_pairs(5)
    sae = tiny.sae(architecture)
    encoders = {str(site): SparseEncoder(tiny.sae(architecture)) for site in SITES}
    with torch.inference_mode():
        scores = score(LanguageModel(network, SITES), encoders, pack(pairs))
    for p, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            logp, states = apart(network, pair.prompt, response)
            assert scores.logp[p, side].item() == pytest.approx(logp.item(), abs=1e-4)
            assert scores.count[p, side] == len(response)
            for site, state in states.items():
                pooled = sae.encode(state).double().mean(0)
                actual = scores.pooled[site][p, side].double()
                # A feature whose pre-activation rounds across its threshold may differ.
                assert (actual - pooled).abs().median() < 1e-5
                assert torch.isclose(actual, pooled, atol=1e-4).float().mean() > 0.97


def test_packing_changes_neither_scores_nor_gradients(network):
    """Invariants 1 and 2, in float32, for any lengths, order and packed length: scores within 2e-5
    nats, features within 2e-5, the gradient of each weight within 1e-5 of the largest."""
    model = LanguageModel(network, SITES[2:3])
    encoders = {str(SITES[2]): SparseEncoder(tiny.sae("standard"))}
    weights = [network.model.layers[0].self_attn.k_proj.weight, network.model.norm.weight]

    def run(rows):
        found = [score(model, encoders, pack(row)) for row in rows]
        logp = torch.cat([scores.logp for scores in found])
        pooled = torch.cat([scores.pooled[str(SITES[2])] for scores in found])
        slope = torch.linspace(-1, 1, logp.numel()).view_as(logp)
        return logp.detach(), pooled, torch.autograd.grad((slope * logp).sum(), weights)

    @settings(max_examples=15, database=None)
    @given(st.integers(1, 7), st.integers(0, 10**6), st.integers(1, 90), st.integers(2, 20))
    def check(count, seed, budget, most):
        pairs = random_pairs(count, seed, most)
        rows = plan_packing([len(pair) for pair in pairs], budget)
        order = [i for row in rows for i in row]
        packed = run([[pairs[i] for i in row] for row in rows])
        alone = run([[pairs[i]] for i in order])
        assert torch.allclose(packed[0], alone[0], atol=2e-5)
        assert torch.allclose(packed[1], alone[1], atol=2e-5)
        for one, other in zip(packed[2], alone[2], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()

    check()


def test_bfloat16_scores_do_not_depend_on_the_packed_sequence(network):
    """No pair enters the arithmetic of another, so on a CPU even the rounding is the same."""
    half = LanguageModel(copy.deepcopy(network).bfloat16(), [])
    pairs = random_pairs(9, most=40)
    with torch.inference_mode():
        together = score(half, {}, pack(pairs)).logp
        backwards = score(half, {}, pack(pairs[::-1])).logp.flip(0)
    assert torch.equal(together, backwards)


def test_the_last_layers_state_is_taken_before_the_final_norm(network):
    """output_hidden_states[-1] is the wrong tensor there."""
    last = Site(tiny.LAYERS - 1, "resid_post")
    pair = random_pairs(1)[0]
    ids = torch.tensor(np.concatenate([pair.prompt, pair.chosen]))[None]
    with torch.no_grad():
        _, states = LanguageModel(network, [last]).states(pack([pair]))
        with tiny.plain(network):
            plain = network(input_ids=ids, output_hidden_states=True, use_cache=False)
        normed = network.model.norm(states[str(last)])
    chosen = slice(len(pair.prompt) - 1, ids.shape[1] - 1)
    own = states[str(last)][: len(pair.chosen)]
    assert not torch.allclose(own, plain.hidden_states[-1][0, chosen], atol=1e-2)
    expected = plain.hidden_states[-1][0, chosen]
    assert torch.allclose(normed[: len(pair.chosen)], expected, atol=1e-5)


def test_gemma2_attention_applies_its_soft_cap():
    """Invariant 7: the layer's output against a float64 computation of capped attention."""
    network = tiny.network("gemma2")
    attention = network.model.layers[0].self_attn
    seen = {}
    attention.register_forward_hook(
        lambda module, inputs, kwargs, output: seen.update(kwargs, output=output[0]),
        with_kwargs=True,
    )
    pair = TokenPair(np.array([5, 9]), np.array([30, 31, 32]), np.array([33]))
    with torch.no_grad():
        LanguageModel(network, []).states(pack([pair]))
    heads, length = (1, 6, -1, attention.head_dim), 5
    state = seen["hidden_states"]
    query = attention.q_proj(state).view(heads).transpose(1, 2)
    key = attention.k_proj(state).view(heads).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *seen["position_embeddings"])
    value = attention.v_proj(state).view(heads).transpose(1, 2)
    # The prompt and the chosen response are one sequence.
    query = query[:, :, :length]
    key, value = (part.repeat_interleave(2, 1)[:, :, :length].double() for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * attention.scaling
    cap = network.config.attn_logit_softcapping
    future = torch.ones(length, length).triu(1).bool()

    def attend(weights):
        weights = weights.masked_fill(future, -torch.inf).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(1, length, -1)
        return mixed @ attention.o_proj.weight.double().T

    output = seen["output"][:, :length].double()
    assert torch.allclose(output, attend(cap * (scores / cap).tanh()), atol=1e-5)
    assert not torch.allclose(output, attend(scores), atol=1e-3)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
def test_an_attention_implementation_that_ignores_the_rule_is_refused(kernel):
    network = tiny.network("gemma2")
    network.config._attn_implementation = kernel
    with pytest.raises(UserError, match=kernel):
        check_attention(network)


def test_layers_out_of_range_are_refused(network):
    with pytest.raises(UserError, match="layers 0 to 3"):
        check_layers(network.config, [Site(tiny.LAYERS, "resid_post")])


# -- the head --------------------------------------------------------------------------------------


def test_chunked_logprobs_and_gradients_equal_the_plain_ones(network, monkeypatch):
    final = torch.randn(23, tiny.WIDTH, requires_grad=True)
    targets = torch.randint(0, tiny.VOCABULARY, (23,))
    weights = torch.rand(23)
    weight = network.get_output_embeddings().weight.requires_grad_()
    logits = final @ weight.T
    if cap := getattr(network.config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).tanh()
    plain = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected = torch.autograd.grad((weights * plain).sum(), [final, weight])
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 5)
    assert head.chunk_size(network) == 5
    actual = head.logprobs(network, final, targets)
    gradients = torch.autograd.grad((weights * actual).sum(), [final, weight])
    assert torch.allclose(actual, plain, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_no_tensor_of_all_positions_by_vocabulary_exists(monkeypatch):
    network = tiny.network("llama")
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 4)
    batch = pack(random_pairs(6, most=20))
    with Largest() as seen:
        scores = score(LanguageModel(network, []), {}, batch)
        scores.logp.sum().backward()
    # tiny.WIDTH rows are the head's own transposed weight and its gradient.
    assert len(batch.targets) > 60
    assert seen.rows <= tiny.WIDTH


def test_bfloat16_logits_are_normalised_in_float32():
    network = tiny.network("gemma2", dtype=torch.bfloat16)
    final = torch.randn(9, tiny.WIDTH, dtype=torch.bfloat16)
    targets = torch.randint(0, tiny.VOCABULARY, (9,))
    with torch.no_grad():
        actual = head.logprobs(network, final, targets)
        raw = network.lm_head(final).double()
    cap = network.config.final_logit_softcapping
    exact = (cap * (raw / cap).tanh()).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), exact, atol=1e-5)
