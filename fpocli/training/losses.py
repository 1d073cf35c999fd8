"""The losses, as pure functions, and what each needs of the reference.

Every pairwise loss is -log sigma(u), and the paper's Table 1 splits u into a difference of
rewards, a margin and a constraint. P pairs; column 0 is chosen, column 1 rejected; all float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fpocli.config import TrainConfig


@dataclass(frozen=True)
class Terms:
    """What the losses are made of.

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
    """What a method makes of P pairs.

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


def _constrain(preference: Preference, divergence: Tensor, settings: TrainConfig) -> Preference:
    """Subtract delta = alpha beta (X_l - sg X_w), X [P, 2] being how far the policy is from the
    reference (paper, equation 4; X = D of equation 10 for fpo)."""
    chosen, rejected = divergence.unbind(1)
    if settings.stop_gradient:
        chosen = chosen.detach()
    delta = settings.alpha * settings.beta * (rejected - chosen)
    return Preference(preference.u - delta, preference.rewards, delta)


def sft(terms: Terms, settings: TrainConfig) -> Preference:
    """Not pairwise: the loss is -a(w) (paper, section 4, the stage before alignment)."""
    return Preference(terms.average[:, 0], terms.average)


def dpo(terms: Terms, settings: TrainConfig) -> Preference:
    """u = beta [(S(w) - S(l)) - (S_ref(w) - S_ref(l))] (paper, equation 7; DPO, equation 7)."""
    rewards = settings.beta * (terms.logp - terms.ref_logp)
    return Preference(_gap(rewards), rewards)


def dpo_norm(terms: Terms, settings: TrainConfig) -> Preference:
    """u = beta [(a(w) - a(l)) - margin_ref] (paper, equation 9): fpo with alpha = 0."""
    rewards = settings.beta * (terms.average - terms.ref_logp / terms.count)
    return Preference(settings.beta * (_gap(terms.average) - terms.ref_margin), rewards)


def simpo(terms: Terms, settings: TrainConfig) -> Preference:
    """u = beta (a(w) - a(l)) - gamma (paper, section 2; SimPO, equation 6)."""
    rewards = settings.beta * terms.average
    return Preference(_gap(rewards) - settings.gamma, rewards)


def simpo_kl(terms: Terms, settings: TrainConfig) -> Preference:
    """u = simpo's - alpha beta (K_l / n_l - sg K_w / n_w) (paper, appendix D.1)."""
    return _constrain(simpo(terms, settings), terms.kl / terms.count, settings)


def tdpo1(terms: Terms, settings: TrainConfig) -> Preference:
    """u = dpo's - beta (K_l - K_w) (paper, equations 2 and 3)."""
    u, rewards, _ = dpo(terms, settings)
    delta = settings.beta * -_gap(terms.kl)
    return Preference(u - delta, rewards, delta)


def tdpo2(terms: Terms, settings: TrainConfig) -> Preference:
    """u = dpo's - alpha beta (K_l - sg K_w) (paper, equations 2 and 4)."""
    return _constrain(dpo(terms, settings), terms.kl, settings)


def fpo(terms: Terms, settings: TrainConfig) -> Preference:
    """u = beta [(a(w) - a(l)) - margin_ref] - alpha beta (D_l - sg D_w) (paper, equation 11)."""
    return _constrain(dpo_norm(terms, settings), terms.distance, settings)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        preference: the pure function above.
        needs: what it reads of the reference: logp, margin and features, which the store holds;
            distribution, which the reference itself gives, loaded beside the policy.
        link: loss = -link(u).
    """

    preference: Callable[[Terms, TrainConfig], Preference]
    needs: frozenset[str]
    link: Callable[[Tensor], Tensor] = F.logsigmoid

    def loss(self, terms: Terms, settings: TrainConfig) -> tuple[Tensor, Preference]:
        """The loss of each pair, [P], and what it was made from."""
        preference = self.preference(terms, settings)
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
