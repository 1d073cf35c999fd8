"""The losses, as pure functions, and what each needs from the store.

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
        distance: [P, 2], D, the mean over sites; 0 for methods without the constraint.
    """

    logp: Tensor
    count: Tensor
    ref_logp: Tensor
    ref_margin: Tensor
    distance: Tensor

    @property
    def average(self) -> Tensor:
        """a = S / n of the policy, [P, 2], nats per token."""
        return self.logp / self.count


class Preference(NamedTuple):
    """What a method makes of a batch: u [P] and the rewards [P, 2] of the two responses."""

    u: Tensor
    rewards: Tensor


def _gap(values: Tensor) -> Tensor:
    """Chosen minus rejected: [P, 2] -> [P]."""
    return values[:, 0] - values[:, 1]


def constraint(distance: Tensor, settings: TrainConfig) -> Tensor:
    """delta = alpha beta (D_l - sg D_w), [P] (paper, equation 4 with D of equation 10)."""
    chosen, rejected = distance.unbind(1)
    if settings.stop_gradient:
        chosen = chosen.detach()
    return settings.alpha * settings.beta * (rejected - chosen)


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


def fpo(terms: Terms, settings: TrainConfig) -> Preference:
    """u = beta [(a(w) - a(l)) - margin_ref] - delta (paper, equation 11)."""
    u, rewards = dpo_norm(terms, settings)
    return Preference(u - constraint(terms.distance, settings), rewards)


def sft(terms: Terms, settings: TrainConfig) -> Preference:
    """Not pairwise: the loss is -a(w) (paper, section 4, the stage before alignment)."""
    return Preference(terms.average[:, 0], terms.average)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        preference: the pure function above.
        needs: what it reads of the store: logp, margin, features.
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
    "simpo": Method(simpo, frozenset()),
    "sft": Method(sft, frozenset(), link=torch.positive),
}
