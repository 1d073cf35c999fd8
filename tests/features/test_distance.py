"""The feature distance against float64 loops over whole vectors (docs/method.md)."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpocli.features.distance import compared_features, feature_distance, policy_features
from fpocli.features.encoder import SparseEncoder, top_k
from fpocli.features.top_features import TopFeatures

M = 40


def sparse_vectors(rng, pairs: int, m: int = M) -> torch.Tensor:
    """Random pooled features [P, 2, m], some rows with few non-zeros, some with ties."""
    values = rng.gamma(1.0, 1.0, (pairs, 2, m)) * (rng.random((pairs, 2, m)) < rng.random())
    if rng.random() < 0.3:
        values = np.round(values)
    return torch.from_numpy(values.astype(np.float32))


def stored(reference: torch.Tensor, k: int, keep=()) -> TopFeatures:
    """What the store keeps of whole vectors: the k largest, and the features in `keep`."""
    index, value = top_k(reference, k)
    unused = torch.where(value > 0, index, 65_535)
    kept = torch.tensor(sorted(keep), dtype=torch.int64)
    return TopFeatures(unused, value, (reference > 0).sum(-1), reference[..., kept], kept)


def naive(policy, reference, k, kept) -> tuple[float, float]:
    """D and the share of I that is missing, for one response, from the definition in float64."""
    policy, reference = policy.double().tolist(), reference.double().tolist()

    def largest(vector, count):
        order = sorted(range(len(vector)), key=lambda i: (-vector[i], i))[:count]
        return {i for i in order if vector[i] > 0}

    union = largest(policy, k) | largest(reference, k)
    known = largest(reference, kept)
    floor = 0.0 if len(largest(reference, M)) <= kept else min(reference[i] for i in known)
    total = 0.0
    missing = 0
    for i in union:
        value = reference[i]
        if i not in known:
            value = min(policy[i], floor)
            missing += floor > 0
        total += (policy[i] - value) ** 2
    return total / k, missing / max(1, len(union))


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 30))
def test_distance_equals_the_definition(seed, k, more):
    rng = np.random.default_rng(seed)
    kept = min(M, k + more)
    policy, reference = sparse_vectors(rng, 3), sparse_vectors(rng, 3)
    compared = compared_features(policy, stored(reference, kept), k)
    values = policy.gather(-1, compared.index)
    actual = feature_distance(values, compared, k)
    missing = (~compared.stored & compared.used).sum(-1) / compared.used.sum(-1).clamp(min=1)
    for p in range(3):
        for side in range(2):
            distance, share = naive(policy[p, side], reference[p, side], k, kept)
            assert actual[p, side].item() == pytest.approx(distance, rel=1e-5, abs=1e-12)
            assert missing[p, side].item() == pytest.approx(share)
            # The columns of I are distinct, so that no feature counts twice.
            used = compared.index[p, side][compared.used[p, side]].tolist()
            assert len(used) == len(set(used)) <= 2 * k


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_distance_is_a_lower_bound_that_tightens_to_the_exact_one(seed, k):
    rng = np.random.default_rng(seed)
    policy, reference = sparse_vectors(rng, 2), sparse_vectors(rng, 2)

    def distance(kept):
        compared = compared_features(policy, stored(reference, kept), k)
        return feature_distance(policy.gather(-1, compared.index), compared, k)

    by_size = [distance(kept) for kept in range(k, M + 1)]
    for smaller, larger in pairwise(by_size):
        assert (smaller <= larger + 1e-6).all()
    exact = by_size[-1]
    most = int((reference > 0).sum(-1).max())
    assert torch.allclose(distance(max(k, most)), exact, rtol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 10))
def test_distance_is_zero_at_step_0(seed, k, more):
    reference = sparse_vectors(np.random.default_rng(seed), 3)
    compared = compared_features(reference, stored(reference, k + more), k)
    distance = feature_distance(reference.gather(-1, compared.index), compared, k)
    assert (distance == 0).all()
    assert ((compared.overlap == 1) | ((reference > 0).sum(-1) == 0)).all()


def test_distance_is_continuous_where_two_features_swap_ranks():
    """Where two features swap ranks D changes continuously."""
    reference = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]] * 2])
    before, after = (
        torch.tensor([[[5.0, 1.5, 1.5 + step, 2.0, 1.4]] * 2]) for step in (-1e-4, 1e-4)
    )
    values = []
    for policy in (before, after):
        compared = compared_features(policy, stored(reference, 2), 2)
        values.append(feature_distance(policy.gather(-1, compared.index), compared, 2))
    assert torch.allclose(values[0], values[1], atol=1e-3)


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(5)
    policy, reference = sparse_vectors(rng, 2), sparse_vectors(rng, 2)
    compared = compared_features(policy, stored(reference, 6), 5)
    values = policy.gather(-1, compared.index).double().requires_grad_()

    def total(tensor):
        return (feature_distance(tensor, compared, 5) * torch.tensor([1.0, 3.0])).sum()

    (gradient,) = torch.autograd.grad(total(values), values)
    step = 1e-6
    for place in np.ndindex(values.shape):
        moved = values.detach().clone()
        moved[place] += step
        slope = (total(moved) - total(values)).item() / step
        assert gradient[place].item() == pytest.approx(slope, abs=1e-4)


def test_gradient_through_the_sae_equals_that_of_the_whole_encoding():
    """At most 2k columns give the same gradient as all m."""
    torch.manual_seed(0)
    lengths, k = [7, 4, 9, 5], 6
    hidden = [torch.randn(n, tiny.WIDTH) for n in lengths]
    sae = tiny.sae("jumprelu")
    reference = torch.rand(2, 2, tiny.FEATURES) * (torch.rand(2, 2, tiny.FEATURES) < 0.5)
    results = []
    for short in (True, False):
        states = tuple(state.clone().requires_grad_() for state in hidden)
        full = torch.stack([sae.encode(state).mean(0) for state in states]).view(2, 2, -1)
        compared = compared_features(full.detach(), stored(reference, 20), k)
        if short:
            values = policy_features(SparseEncoder(tiny.sae("jumprelu")), states, compared)
        else:
            values = full.gather(-1, compared.index)
        distance = feature_distance(values, compared, k)
        results.append((distance, torch.autograd.grad(distance.sum(), states)))
    (one, one_grads), (other, other_grads) = results
    assert torch.allclose(one, other, atol=1e-6)
    for left, right in zip(one_grads, other_grads, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_overlap_is_the_share_of_the_larger_set():
    policy = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    reference = torch.tensor([[[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])
    compared = compared_features(policy, stored(reference, 4), 3)
    # {0, 1, 2} and {0, 3} share one of three; two empty sets share nothing.
    assert compared.overlap[0].tolist() == pytest.approx([1 / 3, 0])


def test_a_reference_value_rounded_to_zero_is_still_compared():
    """float16 rounds a tiny reference value to 0; the policy's large one must still count."""
    reference = TopFeatures(
        torch.tensor([[[3, 7], [3, 7]]]),
        torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]),
        torch.tensor([[2, 2]]),
        torch.zeros(1, 2, 0),
        torch.zeros(0, dtype=torch.int64),
    )
    policy = torch.zeros(1, 2, 9)
    policy[..., 3], policy[..., 7] = 1.0, 5.0
    compared = compared_features(policy, reference, 2)
    distance = feature_distance(policy.gather(-1, compared.index), compared, 2)
    assert distance[0].tolist() == [12.5, 12.5]
