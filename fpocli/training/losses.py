"""The losses, as pure functions, and what each needs of the reference.

Every pairwise loss is -log sigma(u), and the paper's Table 1 splits u into a difference of
rewards, a margin and a constraint.

Shapes: P pairs; column 0 is chosen, column 1 rejected; everything is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Terms:
    """The inputs of a loss.

    Args:
        logp: [P, 2], S of the policy, nats.
        count: [P, 2], n, tokens.
        ref_logp: [P, 2], S of the reference, nats.
        ref_margin: [P], a_ref(chosen) - a_ref(rejected), nats per token.
        distance: [P, 2], D, the mean over sites; 0 for methods that do not compare features.
        kl: [P, 2], K, the sequential KL, nats; 0 for methods without it.
    """

    logp: Tensor
    count: Tensor
    ref_logp: Tensor
    ref_margin: Tensor
    distance: Tensor
    kl: Tensor

    @property
    def average(self) -> Tensor:
        """a = S / n of the policy, [P, 2], nats per token."""
        return self.logp / self.count


class Preference(NamedTuple):
    """The result of a method for P pairs.

    Args:
        u: [P], the loss is -log sigma(u).
        rewards: [P, 2], of the two responses.
        delta: [P], the constraint inside u, for methods that have one.
    """

    u: Tensor
    rewards: Tensor
    delta: Tensor | None = None


def _gap(values: Tensor) -> Tensor:
    """Chosen minus rejected: [P, 2] -> [P]."""
    return values[:, 0] - values[:, 1]


def _constrain(
    preference: Preference, divergence: Tensor, *, alpha: float, beta: float, stop_gradient: bool
) -> Preference:
    """Subtract delta = alpha beta (X_l - sg X_w), X [P, 2] being how far the policy is from the
    reference (paper, equation 4; for fpo X is D of equation 10)."""
    chosen, rejected = divergence.unbind(1)
    if stop_gradient:
        chosen = chosen.detach()
    delta = alpha * beta * (rejected - chosen)
    return Preference(preference.u - delta, preference.rewards, delta)


def sft(terms: Terms) -> Preference:
    """Not pairwise: the loss is -a(w) (paper, section 4, the stage before alignment)."""
    return Preference(terms.average[:, 0], terms.average)


def dpo(terms: Terms, *, beta: float) -> Preference:
    """u = beta [(S(w) - S(l)) - (S_ref(w) - S_ref(l))] (paper, equation 7; DPO, equation 7)."""
    rewards = beta * (terms.logp - terms.ref_logp)
    return Preference(_gap(rewards), rewards)


def dpo_norm(terms: Terms, *, beta: float) -> Preference:
    """u = beta [(a(w) - a(l)) - margin_ref] (paper, equation 9): fpo with alpha = 0."""
    rewards = beta * (terms.average - terms.ref_logp / terms.count)
    return Preference(beta * (_gap(terms.average) - terms.ref_margin), rewards)


def simpo(terms: Terms, *, beta: float, gamma: float) -> Preference:
    """u = beta (a(w) - a(l)) - gamma (paper, section 2; SimPO, equation 6)."""
    rewards = beta * terms.average
    return Preference(_gap(rewards) - gamma, rewards)


def simpo_kl(
    terms: Terms, *, beta: float, gamma: float, alpha: float, stop_gradient: bool
) -> Preference:
    """u = simpo's - alpha beta (K_l / n_l - sg K_w / n_w) (paper, appendix D.1)."""
    preference = simpo(terms, beta=beta, gamma=gamma)
    per_token = terms.kl / terms.count
    return _constrain(preference, per_token, alpha=alpha, beta=beta, stop_gradient=stop_gradient)


def tdpo1(terms: Terms, *, beta: float) -> Preference:
    """u = dpo's - beta (K_l - K_w) (paper, equations 2 and 3)."""
    u, rewards, _ = dpo(terms, beta=beta)
    delta = beta * -_gap(terms.kl)
    return Preference(u - delta, rewards, delta)


def tdpo2(terms: Terms, *, beta: float, alpha: float, stop_gradient: bool) -> Preference:
    """u = dpo's - alpha beta (K_l - sg K_w) (paper, equations 2 and 4)."""
    preference = dpo(terms, beta=beta)
    return _constrain(preference, terms.kl, alpha=alpha, beta=beta, stop_gradient=stop_gradient)


def fpo(terms: Terms, *, beta: float, alpha: float, stop_gradient: bool) -> Preference:
    """u = beta [(a(w) - a(l)) - margin_ref] - alpha beta (D_l - sg D_w) (paper, equation 11)."""
    preference = dpo_norm(terms, beta=beta)
    distance = terms.distance
    return _constrain(preference, distance, alpha=alpha, beta=beta, stop_gradient=stop_gradient)


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        preference: one of the functions above.
        needs: what it reads of the reference: logp, margin and features, which the store holds;
            distribution, for which the reference itself is in memory alongside the policy.
        link: loss = -link(u).
    """

    preference: Callable[..., Preference]
    needs: frozenset[str]
    link: Callable[[Tensor], Tensor] = F.logsigmoid

    def prefer(self, terms: Terms, settings: Any) -> Preference:
        """Call `preference` with the scalars of `settings`, a TrainConfig, that it takes."""
        scalars = list(signature(self.preference).parameters)[1:]
        return self.preference(terms, **{name: getattr(settings, name) for name in scalars})

    def loss(self, terms: Terms, settings: Any) -> tuple[Tensor, Preference]:
        """The loss of each pair, [P], and the preference it is made from."""
        preference = self.prefer(terms, settings)
        return -self.link(preference.u), preference


METHODS: dict[str, Method] = {
    "fpo": Method(fpo, frozenset({"logp", "margin", "features"})),
    "dpo_norm": Method(dpo_norm, frozenset({"logp", "margin"})),
    "dpo": Method(dpo, frozenset({"logp"})),
    "tdpo1": Method(tdpo1, frozenset({"logp", "distribution"})),
    "tdpo2": Method(tdpo2, frozenset({"logp", "distribution"})),
    "simpo": Method(simpo, frozenset()),
    "simpo_kl": Method(simpo_kl, frozenset({"distribution"})),
    "sft": Method(sft, frozenset(), link=torch.positive),
}
