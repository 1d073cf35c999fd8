"""The start-up check refuses whatever differs from plain transformers."""

import dataclasses
import math
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch

from fpocli.data.pairs import TokenPair
from fpocli.features.site import Site
from fpocli.model import attention
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.records import TokenPairs
from fpocli.system.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(network, *sites: Site):
    return check_against_transformers(LanguageModel(network, list(sites)), families.token_pairs())


@pytest.mark.slow
def test_the_page_of_families_is_what_the_check_says():
    """docs/families.md; if a line changed for a good reason, run `make families`."""
    page = Path(__file__).parents[2] / "docs/families.md"
    assert families.page() == page.read_text()


def test_a_kernel_that_drops_attention_sinks_is_refused():
    """gpt-oss: the kernel ignores sinks, and the model runs without an error."""
    with pytest.raises(UserError, match="GptOssForCausalLM does not compute what transformers"):
        check(families.network("gpt_oss"), Site(1, "resid_post"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_right_model_passes_in_every_dtype(family, dtype):
    sites = [Site(layer, kind) for layer in (1, 3) for kind in ("resid_post", "mlp_out")]
    check(tiny.network(family, dtype=dtype), *sites)


def without(**dropped):
    """The kernel, but ignoring one of its arguments."""
    real = attention.attend_by_sequence

    def attend(*arguments, **settings):
        return real(*arguments, **(settings | dropped))

    return attend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["soft-cap", "sliding window"])
def test_a_kernel_that_drops_the_soft_cap_or_the_window_is_refused(monkeypatch, what, dtype):
    if what == "soft-cap":
        monkeypatch.setattr(attention, "attend_by_sequence", without(softcap=None))
    else:
        real = attention.attention_mask
        monkeypatch.setattr(
            "fpocli.model.language_model.attention_mask",
            lambda batch, window, kernel, dtype: real(batch, None, kernel, dtype),
        )
    # Caps of 0.5 and windows of 2 change every token; in bfloat16 rounding is large.
    network = tiny.network("gemma2", dtype=dtype, attn_logit_softcapping=0.5, sliding_window=2)
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        check(network)


def test_a_kernel_that_lets_responses_attend_to_each_other_is_refused(monkeypatch):
    def causal(module, query, key, value, attention_mask, *, scaling, spans, **settings):
        length = query.shape[2]
        mask = torch.ones(length, length).tril().log()[None, None].to(query.dtype)
        whole = spans[:1].copy()
        whole[:] = [0, length, length, length]
        return real(module, query, key, value, mask, scaling=scaling, spans=whole, **settings)

    real = attention.attend_by_sequence
    monkeypatch.setattr(attention, "attend_by_sequence", causal)
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        check(tiny.network("llama"))


def test_a_leak_between_responses_below_the_tolerance_is_refused(monkeypatch):
    """In bfloat16 a difference of a hundredth of a nat is rounding, but not if it depends on
    the text next to a response."""
    real = attention.attend_by_sequence

    def leaking(module, query, key, value, attention_mask, **settings):
        output, weights = real(module, query, key, value, attention_mask, **settings)
        return output + 0.01 * value.mean(), weights

    monkeypatch.setattr(attention, "attend_by_sequence", leaking)
    with pytest.raises(UserError, match="does not follow the attention rule"):
        check(tiny.network("llama", dtype=torch.bfloat16))


def test_rounding_that_depends_on_the_number_of_rows_is_no_leak(monkeypatch):
    """As bfloat16 products with AMX and on GPUs have it."""
    real = attention.attend_by_sequence

    def rounding(module, query, key, value, attention_mask, **settings):
        output, weights = real(module, query, key, value, attention_mask, **settings)
        return output * (1 + 0.01 * math.sin(query.shape[2])), weights

    monkeypatch.setattr(attention, "attend_by_sequence", rounding)
    check(tiny.network("llama", dtype=torch.bfloat16))


def test_positions_that_count_along_the_packed_sequence_are_refused(monkeypatch):
    """The rejected response stands behind the chosen one; its positions must not."""

    def by_place(pairs, multiple):
        batch = pack(pairs, multiple)
        return dataclasses.replace(batch, positions=torch.arange(len(batch.ids)))

    monkeypatch.setattr("fpocli.scoring.startup_check.pack", by_place)
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        check(tiny.network("llama"))


def test_a_head_that_scales_its_logits_is_refused():
    """Granite and Cohere divide or multiply logits; fpo's head does not."""
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        check(families.network("granite", logits_scaling=2.0))


def test_an_mlp_whose_output_is_scaled_before_it_is_added_has_no_hook_point():
    network = families.network("granite", residual_multiplier=0.3)
    check(network, Site(1, "resid_post"))
    with pytest.raises(UserError, match=r"there is no hook point layer_1\.mlp_out"):
        check(network, Site(1, "mlp_out"))


def test_weights_that_give_nan_are_refused():
    network = tiny.network("llama")
    with torch.no_grad():
        network.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="by nan nats per token"):
        check(network)


def test_a_pair_that_gives_nan_in_transformers_too_is_passed_over():
    """`fpo cache` names the row when it scores it."""
    network, tokens = tiny.network("llama"), families.token_pairs(3)
    alone = set(tokens.pair(0).prompt) - set(tokens.pair(1).prompt) - set(tokens.pair(2).prompt)
    used = {
        int(i) for p in (1, 2) for y in ("chosen", "rejected") for i in getattr(tokens.pair(p), y)
    }
    with torch.no_grad():
        network.get_input_embeddings().weight[min(alone - used)] = torch.nan
    found = check_against_transformers(LanguageModel(network, []), tokens)
    assert found.nats < 1e-5


def test_a_window_is_tried_with_a_pair_that_is_longer(monkeypatch):
    """Only the second pair is longer than the window, and only at the end of its responses."""
    real = attention.attention_mask
    monkeypatch.setattr(
        "fpocli.model.language_model.attention_mask",
        lambda batch, window, kernel, dtype: real(batch, None, kernel, dtype),
    )
    monkeypatch.setattr("fpocli.scoring.startup_check._COMPARED", 20)
    ids = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (2, 60))
    pairs = [TokenPair(i[:5], i[5:n], i[6:n]) for i, n in zip(ids, (20, 60), strict=True)]
    packed = pack(pairs)
    tokens = TokenPairs(packed.ids.numpy(), packed.spans, np.arange(2))
    for window, agrees in ((64, True), (40, False)):
        model = LanguageModel(tiny.network("gemma2", sliding_window=window), [])
        if agrees:
            check_against_transformers(model, tokens)
        else:
            with pytest.raises(UserError, match="does not compute what transformers computes"):
                check_against_transformers(model, tokens)


def test_gpt2_agrees_with_transformers():
    found = check(families.network("gpt2"), Site(1, "resid_post"), Site(2, "mlp_out"))
    assert found.nats < 1e-5 and found.states < 1e-5


def test_the_check_restores_the_attention_kernel():
    model = LanguageModel(tiny.network("gemma2"), [])
    before = model.config._attn_implementation
    check_against_transformers(model, families.token_pairs())
    assert model.config._attn_implementation == before
