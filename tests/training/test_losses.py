"""Every loss against a float64 loop, finite differences, and the identities between methods."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpocli.config import TrainConfig
from fpocli.training.losses import METHODS, Terms

PAIRS = 5


def make_terms(seed: int) -> Terms:
    rng = np.random.default_rng(seed)
    count = torch.from_numpy(rng.integers(1, 60, (PAIRS, 2))).double()
    logp, ref_logp = (-count * torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))) for _ in range(2))
    average = ref_logp / count
    return Terms(
        logp=logp,
        count=count,
        ref_logp=ref_logp,
        ref_margin=average[:, 0] - average[:, 1],
        distance=torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))),
        kl=torch.from_numpy(rng.gamma(2, 1, (PAIRS, 2))),
    )


def config(method: str, **changes) -> TrainConfig:
    return TrainConfig(cache="unused", method=method, **changes)


def closed_form(method: str, t: Terms, p: int, c: TrainConfig) -> tuple[float, float]:
    """u and the loss of one pair, written from method.md's table."""
    s_w, s_l = t.logp[p].tolist()
    n_w, n_l = t.count[p].tolist()
    r_w, r_l = t.ref_logp[p].tolist()
    d_w, d_l = t.distance[p].tolist()
    k_w, k_l = t.kl[p].tolist()
    margin_ref = r_w / n_w - r_l / n_l
    dpo = c.beta * ((s_w - s_l) - (r_w - r_l))
    simpo = c.beta * (s_w / n_w - s_l / n_l) - c.gamma
    if method == "sft":
        return s_w / n_w, -s_w / n_w
    u = {
        "dpo": dpo,
        "tdpo1": dpo - c.beta * (k_l - k_w),
        "tdpo2": dpo - c.alpha * c.beta * (k_l - k_w),
        "simpo": simpo,
        "simpo_kl": simpo - c.alpha * c.beta * (k_l / n_l - k_w / n_w),
        "dpo_norm": c.beta * ((s_w / n_w - s_l / n_l) - margin_ref),
        "fpo": c.beta * ((s_w / n_w - s_l / n_l) - margin_ref) - c.alpha * c.beta * (d_l - d_w),
    }[method]
    return u, math.log1p(math.exp(-u)) if u > -30 else -u


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(0.01, 3), st.floats(0, 2))
@pytest.mark.parametrize("method", METHODS)
def test_closed_forms(method, seed, alpha, beta, gamma):
    terms = make_terms(seed)
    settings_ = config(method, alpha=alpha, beta=beta, gamma=gamma)
    loss, preference = METHODS[method].loss(terms, settings_)
    for p in range(PAIRS):
        u, expected = closed_form(method, terms, p, settings_)
        assert preference.u[p].item() == pytest.approx(u, rel=1e-9, abs=1e-9)
        assert loss[p].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_equal_finite_differences(method, stop_gradient):
    base = make_terms(3)
    settings_ = config(method, stop_gradient=stop_gradient)
    names = ("logp", "distance", "kl")
    inputs = {name: getattr(base, name).clone().requires_grad_() for name in names}

    def total(values):
        loss, _ = METHODS[method].loss(dataclasses.replace(base, **values), settings_)
        return loss.sum()

    gradients = torch.autograd.grad(total(inputs), list(inputs.values()), allow_unused=True)
    step = 1e-6
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        for place in np.ndindex(tensor.shape):
            stopped = name != "logp" and place[1] == 0 and stop_gradient and method != "tdpo1"
            moved = {key: value.detach().clone() for key, value in inputs.items()}
            moved[name][place] += step
            slope = 0.0 if stopped else (total(moved) - total(inputs)).item() / step
            actual = 0.0 if gradient is None else gradient[place].item()
            assert actual == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("method", ["fpo", "dpo_norm", "dpo", "tdpo1", "tdpo2"])
def test_loss_is_ln_2_where_the_policy_is_the_reference(method):
    terms, zeros = make_terms(1), torch.zeros(PAIRS, 2)
    terms = dataclasses.replace(terms, logp=terms.ref_logp, distance=zeros, kl=zeros)
    loss, preference = METHODS[method].loss(terms, config(method))
    assert torch.allclose(preference.u, torch.zeros(PAIRS).double(), atol=1e-15)
    assert torch.allclose(loss, torch.full((PAIRS,), math.log(2)).double(), atol=1e-15)


@pytest.mark.parametrize(
    ("method", "plain"), [("fpo", "dpo_norm"), ("tdpo2", "dpo"), ("simpo_kl", "simpo")]
)
def test_without_alpha_a_constrained_method_is_the_plain_one(method, plain):
    terms, beta = make_terms(2), 0.3
    own, _ = METHODS[method].loss(terms, config(method, beta=beta, alpha=0))
    other, _ = METHODS[plain].loss(terms, config(plain, beta=beta))
    assert torch.equal(own, other)


def test_tdpo2_with_alpha_1_is_tdpo1_up_to_the_stopped_gradient():
    results = {}
    for method, stop in (("tdpo1", True), ("tdpo2", False), ("tdpo2", True)):
        terms = make_terms(8)
        terms.kl.requires_grad_()
        loss, _ = METHODS[method].loss(terms, config(method, alpha=1, stop_gradient=stop))
        (gradient,) = torch.autograd.grad(loss.sum(), terms.kl)
        results[method, stop] = loss, gradient
    loss, gradient = results["tdpo1", True]
    for stop in (False, True):
        assert torch.equal(results["tdpo2", stop][0], loss)
        assert torch.equal(results["tdpo2", stop][1][:, 1], gradient[:, 1])
    assert torch.equal(results["tdpo2", False][1], gradient)
    assert (results["tdpo2", True][1][:, 0] == 0).all() and (gradient[:, 0] != 0).all()


def test_dpo_is_dpo_norm_n_times_stronger_where_all_responses_have_n_tokens():
    terms = make_terms(9)
    terms = dataclasses.replace(terms, count=torch.full((PAIRS, 2), 7.0).double())
    average = terms.ref_logp / 7
    terms = dataclasses.replace(terms, ref_margin=average[:, 0] - average[:, 1])
    one, _ = METHODS["dpo"].loss(terms, config("dpo", beta=0.1))
    other, _ = METHODS["dpo_norm"].loss(terms, config("dpo_norm", beta=0.7))
    assert torch.allclose(one, other, rtol=1e-12)


def test_dpo_norm_is_simpo_against_a_reference_without_preference():
    terms = dataclasses.replace(make_terms(2), ref_margin=torch.zeros(PAIRS).double())
    settings_ = config("simpo", beta=0.7, gamma=0)
    one, _ = METHODS["simpo"].loss(terms, settings_)
    other, _ = METHODS["dpo_norm"].loss(terms, settings_)
    assert torch.allclose(one, other, rtol=1e-12)


def test_stop_gradient_changes_the_gradient_of_chosen_alone():
    grads = {}
    for stop in (True, False):
        terms = make_terms(4)
        terms.distance.requires_grad_()
        METHODS["fpo"].loss(terms, config("fpo", stop_gradient=stop))[0].sum().backward()
        grads[stop] = terms.distance.grad
    assert (grads[True][:, 0] == 0).all()
    assert (grads[False][:, 0] != 0).all()
    assert torch.equal(grads[True][:, 1], grads[False][:, 1])


def test_rewards_are_what_u_is_made_of():
    terms = make_terms(6)
    for method in ("dpo", "dpo_norm"):
        _, (u, rewards, delta) = METHODS[method].loss(terms, config(method))
        assert torch.allclose(rewards[:, 0] - rewards[:, 1], u) and delta is None
    for method in ("fpo", "tdpo1", "tdpo2"):
        _, (u, rewards, delta) = METHODS[method].loss(terms, config(method))
        assert torch.allclose(rewards[:, 0] - rewards[:, 1] - delta, u)


def test_a_huge_u_stays_finite():
    terms = dataclasses.replace(make_terms(7), logp=torch.tensor([[-1e6, 0.0]] * PAIRS).double())
    loss, _ = METHODS["dpo"].loss(terms, config("dpo", beta=10))
    assert loss.isfinite().all()
