"""Every reward with every constraint against a float64 loop, finite differences and the identities
between them."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpocli.config import METHODS, TrainConfig
from fpocli.system.errors import UserError
from fpocli.training.losses import Preference, Terms, preference_loss

PAIRS = 5
ALL = [*product(("dpo", "dpo_norm", "simpo"), ("none", "features", "kl", "tdpo1")), ("sft", "none")]
SCALARS = {
    "alpha": 0.5, "beta": 0.1, "gamma": 0.5, "stop_gradient": True, "sft_weight": 0.0,
    "label_smoothing": 0.0,
}  # fmt: skip


def make_terms(seed: int) -> Terms:
    rng = np.random.default_rng(seed)
    count = torch.from_numpy(rng.integers(1, 60, (PAIRS, 2))).double()
    logp, ref_logp = (-count * torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))) for _ in range(2))
    return Terms(
        logp=logp,
        count=count,
        ref_logp=ref_logp,
        distance=torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))),
        kl=torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))),
    )


def lose(terms: Terms, reward: str, constraint: str, **changes) -> Preference:
    return preference_loss(terms, reward=reward, constraint=constraint, **SCALARS | changes)


def closed_form(t: Terms, p: int, reward: str, constraint: str, **scalars) -> tuple[float, float]:
    """u and the loss of one pair, written from method.md's tables."""
    c = SCALARS | scalars
    s, n, r, d, k = (
        values[p].tolist() for values in (t.logp, t.count, t.ref_logp, t.distance, t.kl)
    )
    if reward == "sft":
        return s[0] / n[0], -s[0] / n[0]
    r_w, r_l = {
        "dpo": [c["beta"] * (s[y] - r[y]) for y in (0, 1)],
        "dpo_norm": [c["beta"] * (s[y] / n[y] - r[y] / n[y]) for y in (0, 1)],
        "simpo": [c["beta"] * s[y] / n[y] for y in (0, 1)],
    }[reward]
    if reward != "dpo":
        k = [k[y] / n[y] for y in (0, 1)]
    delta = {
        "none": 0.0,
        "features": c["alpha"] * c["beta"] * (d[1] - d[0]),
        "kl": c["alpha"] * c["beta"] * (k[1] - k[0]),
        "tdpo1": c["beta"] * (k[1] - k[0]),
    }[constraint]
    u = r_w - r_l - (c["gamma"] if reward == "simpo" else 0.0) - delta

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    smoothing = c["label_smoothing"]
    loss = (1 - smoothing) * softplus(-u) + smoothing * softplus(u)
    return u, loss - c["sft_weight"] * s[0] / n[0]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    alpha=st.floats(0, 3),
    beta=st.floats(0.01, 3),
    gamma=st.floats(0, 2),
    sft_weight=st.floats(0, 2),
    label_smoothing=st.floats(0, 0.5),
)
@pytest.mark.parametrize(("reward", "constraint"), ALL)
def test_closed_forms(reward, constraint, seed, **scalars):
    terms = make_terms(seed)
    result = lose(terms, reward, constraint, **scalars)
    for p in range(PAIRS):
        u, loss = closed_form(terms, p, reward, constraint, **scalars)
        assert result.u[p].item() == pytest.approx(u, rel=1e-9, abs=1e-9)
        assert result.loss[p].item() == pytest.approx(loss, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("reward", "constraint"), ALL)
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_equal_finite_differences(reward, constraint, stop_gradient):
    base = make_terms(3)
    scalars = {"stop_gradient": stop_gradient, "sft_weight": 0.3, "label_smoothing": 0.1}
    names = ("logp", "distance", "kl")
    inputs = {name: getattr(base, name).clone().requires_grad_() for name in names}

    def total(values):
        return lose(dataclasses.replace(base, **values), reward, constraint, **scalars).loss.sum()

    gradients = torch.autograd.grad(total(inputs), list(inputs.values()), allow_unused=True)
    step = 1e-6
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        for place in np.ndindex(tensor.shape):
            stopped = name != "logp" and place[1] == 0 and stop_gradient and constraint != "tdpo1"
            moved = {key: value.detach().clone() for key, value in inputs.items()}
            moved[name][place] += step
            slope = 0.0 if stopped else (total(moved) - total(inputs)).item() / step
            actual = 0.0 if gradient is None else gradient[place].item()
            assert actual == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "constraint"), [both for both in ALL if both[0] in ("dpo", "dpo_norm")]
)
def test_u_is_0_to_the_bit_where_the_policy_is_the_reference(reward, constraint):
    terms, zeros = make_terms(1), torch.zeros(PAIRS, 2)
    terms = dataclasses.replace(terms, logp=terms.ref_logp, distance=zeros, kl=zeros)
    result = lose(terms, reward, constraint)
    assert (result.u == 0).all() and torch.allclose(
        result.loss, torch.full((PAIRS,), math.log(2)).double(), atol=1e-15
    )


@pytest.mark.parametrize(
    ("reward", "constraint"), [both for both in ALL if both[1] in ("features", "kl")]
)
def test_without_alpha_a_constraint_does_nothing(reward, constraint):
    terms = make_terms(2)
    own, plain = lose(terms, reward, constraint, alpha=0), lose(terms, reward, "none")
    assert torch.equal(own.loss, plain.loss)


@pytest.mark.parametrize("reward", ["dpo", "dpo_norm", "simpo"])
def test_kl_with_alpha_1_is_tdpo1_up_to_the_stopped_gradient(reward):
    results = {}
    for constraint, stop in (("tdpo1", True), ("kl", False), ("kl", True)):
        terms = make_terms(8)
        terms.kl.requires_grad_()
        loss = lose(terms, reward, constraint, alpha=1, stop_gradient=stop).loss
        (gradient,) = torch.autograd.grad(loss.sum(), terms.kl)
        results[constraint, stop] = loss, gradient
    loss, gradient = results["tdpo1", True]
    for stop in (False, True):
        assert torch.equal(results["kl", stop][0], loss)
        assert torch.equal(results["kl", stop][1][:, 1], gradient[:, 1])
    assert torch.equal(results["kl", False][1], gradient)
    assert (results["kl", True][1][:, 0] == 0).all() and (gradient[:, 0] != 0).all()


def test_dpo_is_dpo_norm_n_times_stronger_where_all_responses_have_n_tokens():
    terms = dataclasses.replace(make_terms(9), count=torch.full((PAIRS, 2), 7.0).double())
    one = lose(terms, "dpo", "none", beta=0.1)
    other = lose(terms, "dpo_norm", "none", beta=0.7)
    assert torch.allclose(one.loss, other.loss, rtol=1e-12)


def test_dpo_norm_is_simpo_against_a_reference_without_preference():
    terms = make_terms(2)
    terms = dataclasses.replace(terms, ref_logp=-1.7 * terms.count)
    one = lose(terms, "simpo", "none", beta=0.7, gamma=0)
    other = lose(terms, "dpo_norm", "none", beta=0.7)
    assert torch.allclose(one.loss, other.loss, rtol=1e-12)


def test_label_smoothing_of_one_half_does_not_tell_the_responses_apart():
    terms = make_terms(5)
    swapped = Terms(**{name: value.flip(1) for name, value in vars(terms).items()})
    one, other = (lose(t, "dpo", "none", label_smoothing=0.5).loss for t in (terms, swapped))
    assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(("reward", "constraint"), ALL)
def test_rewards_and_delta_are_what_u_is_made_of(reward, constraint):
    result = lose(make_terms(6), reward, constraint)
    if reward == "sft":
        assert torch.equal(result.u, result.rewards[:, 0])
        return
    delta = 0 if result.delta is None else result.delta
    gamma = 0.5 if reward == "simpo" else 0
    expected = result.rewards[:, 0] - result.rewards[:, 1] - gamma - delta
    assert torch.allclose(expected, result.u)
    assert (result.delta is None) == (result.divergence is None) == (constraint == "none")


def test_a_huge_u_stays_finite():
    terms = dataclasses.replace(make_terms(7), logp=torch.tensor([[-1e6, 0.0]] * PAIRS).double())
    assert lose(terms, "dpo", "none", beta=10, label_smoothing=0.1).loss.isfinite().all()


def test_a_method_is_a_name_of_a_reward_and_a_constraint():
    for method, (reward, constraint) in METHODS.items():
        named, told = (
            TrainConfig(cache="unused", method=method),
            TrainConfig(cache="unused", reward=reward, constraint=constraint),
        )
        assert named == told and (named.reward, named.constraint) == (reward, constraint)
        # As config.yaml has it.
        assert TrainConfig(**dataclasses.asdict(named)) == named
    free = TrainConfig(cache="unused", reward="dpo", constraint="features")
    assert free.method == "dpo+features" == TrainConfig(cache="unused", method=free.method).method
    assert TrainConfig(cache="unused", reward="simpo").method == "simpo+features"
    assert TrainConfig(cache="unused", constraint="kl").method == "dpo_norm+kl"
    assert TrainConfig(cache="unused", reward="sft").method == "sft"
    assert TrainConfig(cache="unused", method="dpo_norm+features").method == "fpo"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "ppo"}, "ppo is unknown"),
        ({"method": "dpo+ppo"}, "is unknown"),
        ({"method": "fpo", "reward": "dpo"}, "is the reward dpo_norm with the constraint features"),
        ({"reward": "sft", "constraint": "kl"}, "not pairwise"),
        ({"method": "sft+kl"}, "not pairwise"),
        ({"method": "sft", "label_smoothing": 0.1}, "not pairwise"),
        ({"method": "sft", "sft_weight": 0.1}, "not pairwise"),
        ({"label_smoothing": 0.6}, "out of range"),
        ({"method": "dpo", "hold": 1.0}, "needs a number above 0, a constraint"),
        ({"method": "tdpo1", "hold": 1.0}, "needs a number above 0, a constraint"),
        ({"hold": 0}, "needs a number above 0, a constraint"),
        ({"hold": math.inf}, "needs a number above 0"),
        ({"hold": 1.0, "beta": 0}, "needs a number above 0"),
        ({"hold": 1.0, "stop_gradient": False}, "would push the chosen responses away"),
        ({"exact_kl": True}, "needs no KL"),
    ],
)
def test_settings_that_contradict_each_other(changes, expected):
    with pytest.raises(UserError, match=expected):
        TrainConfig(cache="unused", **changes)
