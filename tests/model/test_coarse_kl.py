"""The KL's lower bound from n stored tokens: its properties, its gradient, and its bits."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import Largest, random_pairs

from fpocli.data.top_tokens import TopTokens
from fpocli.model import head
from fpocli.model.coarse_kl import coarse_kl, coarse_logprobs, top_tokens
from fpocli.model.language_model import FrozenReference, LanguageModel
from fpocli.model.packing import pack, plan_packing
from fpocli.scoring.score import score

V = 40


def random_logits(seed: int, spread: float, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two distributions per row; a large spread gives nearly all mass to one token."""
    draw = torch.Generator().manual_seed(seed)
    one = spread * torch.randn(rows, V, generator=draw)
    return one, one + torch.randn(rows, V, generator=draw)


def exact(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def naive(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The bound in float64, with gradient to q."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    total = torch.where(inside, p.exp() * (p - q), 0).sum(-1)
    rest = [x.masked_fill(inside, -torch.inf).logsumexp(-1) for x in (p, q)]
    return total + rest[0].exp() * (rest[0] - rest[1])


TARGETS = torch.zeros(6, dtype=torch.int64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_a_lower_bound_that_rises_with_n_and_is_exact_at_v(seed, spread):
    p, q = random_logits(seed, spread)
    kl, before = exact(p, q), torch.zeros(6, dtype=torch.float64)
    size = kl.clamp(min=1)
    for n in (1, 2, 5, 17, V - 1, V):
        _, known = top_tokens(p, TARGETS, n)
        _, bound = coarse_kl(q, TARGETS, known)
        bound = bound.double()
        assert (bound >= -1e-6 * size).all()
        assert (bound <= kl + 1e-5 * size).all()
        assert (bound >= before - 1e-5 * size).all()
        before = bound
    assert torch.allclose(before, kl, rtol=1e-4, atol=1e-5)
    # The last token but one alone in the rest: nothing is lumped together.
    _, almost = coarse_kl(q, TARGETS, top_tokens(p, TARGETS, V - 1)[1])
    assert torch.allclose(almost.double(), kl, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 5.0, 60.0]), st.integers(1, V - 1))
def test_the_gradient_is_that_of_the_bound_in_float64(seed, spread, n):
    """Also where the rest, or the n, have no probability in float32."""
    p, q = random_logits(seed, spread)
    targets = torch.randint(0, V, (6,), generator=torch.Generator().manual_seed(seed))
    _, known = top_tokens(p, targets, n)
    own, other = q.clone().requires_grad_(), q.double().requires_grad_()
    logp, bound = coarse_kl(own, targets, known)
    slope = torch.linspace(-1, 1, 6)
    (slope * bound + slope.flip(0) * logp).sum().backward()
    expected = other.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-5)
    bounds = naive(p, other, known.ids)
    assert torch.allclose(bound.double(), bounds, rtol=1e-4, atol=1e-4)
    (slope * bounds + slope.flip(0) * expected).sum().backward()
    assert own.grad.isfinite().all()
    assert torch.allclose(own.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_finite_differences_of_the_function():
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 9, dtype=torch.float64)).requires_grad_()
    targets, ids = torch.tensor([0, 3, 8, 8]), torch.randn(4, 9).topk(3).indices
    assert torch.autograd.gradcheck(lambda x: coarse_logprobs(x, targets, ids), logits)


def test_the_whole_vocabularys_gradient_is_the_kls():
    p, q = random_logits(3, 2.0)
    q = q.requires_grad_()
    _, known = top_tokens(p, TARGETS, V)
    assert known.ids is None and (known.rest == -torch.inf).all()
    (own,) = torch.autograd.grad(coarse_kl(q, TARGETS, known)[1].sum(), q)
    (other,) = torch.autograd.grad(exact(p, q).sum(), q)
    assert torch.allclose(own, other, atol=1e-6)


def test_float16_records_renormalised_give_a_finite_value_near_0():
    p, _ = random_logits(5, 8.0)
    _, known = top_tokens(p, TARGETS, 5)
    both = torch.cat([known.logp, known.rest[:, None]], -1).half().float()
    both = both - both.logsumexp(-1, keepdim=True)
    rounded = TopTokens(known.ids, both[:, :-1], both[:, -1])
    bound = coarse_kl(p, TARGETS, rounded)[1]
    assert bound.isfinite().all() and (bound >= -1e-6).all() and (bound <= 1e-4).all()


@pytest.mark.parametrize("n", [3, 5, 20, V])
def test_tokens_that_a_head_rules_out_add_nothing(n):
    """Logits of -inf, of p and q alike, in a head that masks tokens; 5 are left."""
    p, q = random_logits(7, 2.0)
    p[:, 5:] = q[:, 5:] = -torch.inf
    _, known = top_tokens(p, TARGETS, n)
    assert not known.logp.isnan().any() and not known.rest.isnan().any()
    q = q.requires_grad_()
    _, bound = coarse_kl(q, TARGETS, known)
    left = exact(p[:, :5], q[:, :5])
    assert bound.isfinite().all() and (bound.double() <= left + 1e-5).all()
    if n >= 5:
        assert torch.allclose(bound.double(), left, atol=1e-5)
    assert (coarse_kl(p, TARGETS, known)[1].abs() < 1e-6).all()
    (slope,) = torch.autograd.grad(bound.sum(), q)
    assert slope.isfinite().all() and (slope[:, 5:] == 0).all()


def test_a_row_alone_gives_the_bits_it_gives_among_others():
    """With several threads, which may share out the sum over a single row."""
    torch.set_num_threads(2)
    try:
        wide = 3 * torch.randn(7, 50_000, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(7)
        ids = wide.topk(64, -1).indices
        together = coarse_logprobs(wide, targets, ids)
        alone = [coarse_logprobs(wide[i, None], targets[i, None], ids[i, None]) for i in range(7)]
    finally:
        torch.set_num_threads(1)
    for values, single in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(values, torch.cat(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("n", [5, tiny.VOCABULARY])
def test_the_bound_is_0_where_the_policy_is_the_reference(family, dtype, n, monkeypatch):
    """Packed otherwise, and in other chunks, than when the distributions were made: to the bit in
    bfloat16. In float32 a product's last bit depends on the number of its rows."""
    model = LanguageModel(tiny.network(family, dtype=dtype), [])
    pairs = random_pairs(5)
    with torch.inference_mode():
        made = [score(model, {}, pack([pair]), distributions=n) for pair in pairs]
    parts = [scores.top for scores in made]
    top = TopTokens(
        None if n == tiny.VOCABULARY else torch.cat([part.ids for part in parts]),
        torch.cat([part.logp for part in parts]),
        torch.cat([part.rest for part in parts]),
    )
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 7)
    scores = score(model, {}, pack(pairs), top=top)
    assert scores.kl_bound.abs().max() <= (0 if dtype == torch.bfloat16 else 1e-6)
    plain = score(model, {}, pack(pairs))
    assert torch.equal(plain.logp, scores.logp) and plain.kl_bound is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_bound_of_a_model_and_its_gradient(family, monkeypatch):
    """Below the exact KL, equal to it with the whole vocabulary, gradients of the weights too."""
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 7)
    network, other = (tiny.network(family, seed) for seed in (0, 1))
    policy, reference = LanguageModel(network, []), FrozenReference(other, [])
    maker = LanguageModel(other, [])
    weights = [
        network.model.layers[0].self_attn.k_proj.weight,
        network.get_output_embeddings().weight,
    ]
    pairs = random_pairs(4, 1, 14)
    for row in plan_packing([len(pair) for pair in pairs], 60):
        batch = pack([pairs[i] for i in row])
        before = torch.zeros(())
        for n in (3, 50, tiny.VOCABULARY):
            with torch.no_grad():
                top = score(maker, {}, batch, distributions=n).top
            scores = score(policy, {}, batch, reference(batch), top)
            assert (scores.kl_bound <= scores.kl + 1e-4).all()
            assert (scores.kl_bound >= before - 1e-4).all()
            before = scores.kl_bound.detach()
        slope = torch.linspace(-1, 1, before.numel()).view_as(before)
        own, expected = (
            torch.autograd.grad((slope * kl).sum(), weights, retain_graph=True)
            for kl in (scores.kl_bound, scores.kl)
        )
        for one, two in zip(own, expected, strict=True):
            assert (one - two).abs().max() <= 1e-4 * two.abs().max() + 1e-7


def test_no_tensor_of_all_positions_by_vocabulary_exists(monkeypatch):
    monkeypatch.setattr(head, "_CHUNK_BYTES_CPU", 4 * tiny.VOCABULARY * 4)
    model = LanguageModel(tiny.network("llama"), [])
    batch = pack(random_pairs(6, most=20))
    with Largest() as seen:
        with torch.no_grad():
            top = score(model, {}, batch, distributions=8).top
        scores = score(model, {}, batch, top=top)
        (scores.logp.sum() + scores.kl_bound.sum()).backward()
    assert len(batch.targets) > 60
    assert seen.rows <= tiny.WIDTH
