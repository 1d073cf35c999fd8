"""The losses, as pure functions.

A pairwise loss is -log sigma(u) with u = r(w) - r(l) - gamma - delta: a reward r and a constraint
delta, freely combined (paper, Table 1; the names of the paper are in `config/methods.py: METHODS`).

Shapes: P pairs; column 0 is chosen (w), column 1 rejected (l); everything is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from fpocli.config.methods import Constraint, Reward


@dataclass(frozen=True)
class Terms:
    """The inputs of a loss.

    Args:
        logp: [P, 2], S of the policy, nats.
        count: [P, 2], n, tokens.
        ref_logp: [P, 2], S of the reference, nats.
        distance: [P, 2], D, the mean over sites; 0 if no features are compared.
        kl: [P, 2], K, the sequential KL, nats; 0 without it.
    """

    logp: Tensor
    count: Tensor
    ref_logp: Tensor
    distance: Tensor
    kl: Tensor


def dpo(terms: Terms) -> Tensor:
    """S - S_ref, nats (paper, equation 7; DPO, equation 7)."""
    return terms.logp - terms.ref_logp


def dpo_norm(terms: Terms) -> Tensor:
    """a - a_ref, with a = S / n, nats per token (paper, equation 9)."""
    return terms.logp / terms.count - terms.ref_logp / terms.count


def simpo(terms: Terms) -> Tensor:
    """a = S / n, nats per token (paper, section 2; SimPO, equation 6)."""
    return terms.logp / terms.count


# By --reward: r / beta, [P, 2]. sft is not pairwise: its loss is -a(w) (paper, section 4).
REWARDS: dict[Reward, Callable[[Terms], Tensor]] = {
    "dpo": dpo,
    "dpo_norm": dpo_norm,
    "simpo": simpo,
    "sft": simpo,
}


def divergence(terms: Terms, reward: Reward, constraint: Constraint) -> Tensor | None:
    """How far the policy is from the reference, as the constraint measures it: [P, 2].

    D (paper, equation 10), or K (the definition after equation 3), which is taken per token where
    the reward is (appendix D.1); None without a constraint.
    """
    if constraint == "none":
        return None
    if constraint == "features":
        return terms.distance
    return terms.kl if reward == "dpo" else terms.kl / terms.count


class Preference(NamedTuple):
    """The loss of P pairs and what it is made of.

    Args:
        loss: [P].
        u: [P], the argument of the sigmoid; a(w) for sft.
        rewards: [P, 2], of the two responses.
        divergence: [P, 2], what the constraint is on; None without one.
        delta: [P], the constraint inside u; None without one.
    """

    loss: Tensor
    u: Tensor
    rewards: Tensor
    divergence: Tensor | None
    delta: Tensor | None


def preference_loss(
    terms: Terms,
    *,
    reward: Reward,
    constraint: Constraint,
    alpha: float,
    beta: float,
    gamma: float,
    stop_gradient: bool,
    sft_weight: float = 0.0,
    label_smoothing: float = 0.0,
) -> Preference:
    """-log sigma(u), and added to it sft_weight times -a(w) (paper, equations 8 and 11, Table 1).

    Args:
        terms: of P pairs.
        reward, constraint: what u is made of.
        alpha: weight of the constraint (features, kl).
        beta: scale of the rewards.
        gamma: target margin of the reward simpo.
        stop_gradient: whether the chosen response's divergence has no gradient (features, kl).
        sft_weight: weight of the SFT loss.
        label_smoothing: epsilon of conservative DPO: the probability that chosen and rejected are
            the wrong way round.
    """
    if reward == "sft":
        average = simpo(terms)
        return Preference(-average[:, 0], average[:, 0], average, None, None)
    rewards = beta * REWARDS[reward](terms)
    u = rewards[:, 0] - rewards[:, 1]
    if reward == "simpo":
        u = u - gamma
    apart, delta = divergence(terms, reward, constraint), None
    if apart is not None:
        delta = constraint_delta(apart, constraint, alpha, beta, stop_gradient=stop_gradient)
        u = u - delta
    right, wrong = F.logsigmoid(u), F.logsigmoid(-u)
    loss = -(1 - label_smoothing) * right - label_smoothing * wrong
    loss = loss - sft_weight * simpo(terms)[:, 0]
    return Preference(loss, u, rewards, apart, delta)


def constraint_delta(
    divergence: Tensor, constraint: Constraint, alpha: float, beta: float, *, stop_gradient: bool
) -> Tensor:
    """delta: alpha beta (X_l - sg X_w) (paper, equations 4 and 11); for tdpo1 beta (X_l - X_w)
    (equations 2 and 3).

    Args:
        divergence: X, float32 [P, 2].
        constraint: what X is.
        alpha: weight of the constraint; tdpo1 has none.
        beta: scale of the rewards.
        stop_gradient: whether X_w has no gradient; tdpo1 never stops it.

    Returns:
        float32 [P].
    """
    chosen, rejected = divergence.unbind(1)
    if constraint == "tdpo1":
        return beta * (rejected - chosen)
    return alpha * beta * (rejected - (chosen.detach() if stop_gradient else chosen))
