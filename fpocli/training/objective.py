"""Scores of the policy and values of the store -> loss and metrics of each pair.

Shapes: P pairs; column 0 is chosen, column 1 rejected.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from fpocli.config import TrainConfig
from fpocli.features.distance import (
    ComparedFeatures,
    compared_features,
    feature_distance,
    group_distances,
    policy_features,
)
from fpocli.features.encoder import SparseEncoder
from fpocli.features.weights import FeatureWeights
from fpocli.scoring.accuracy import wins
from fpocli.scoring.score import PairScores
from fpocli.store.records import ReferenceValues
from fpocli.training.losses import REWARDS, Terms, preference_loss

# The mean of a group's part of D.
_PART = re.compile(r"(group\..+)\.part_(chosen|rejected)")


def compare_features(
    scores: PairScores,
    reference: ReferenceValues[Tensor],
    encoders: dict[str, SparseEncoder],
    k: int,
    weights: Mapping[str, FeatureWeights] = MappingProxyType({}),
) -> tuple[dict[str, ComparedFeatures], dict[str, Tensor]]:
    """The compared features of each site, and D there, float32 [P, 2] with gradient.

    Args:
        scores: the policy's.
        reference: the store's values of the same pairs.
        encoders: the SAE of each site.
        k: features compared per side.
        weights: weights of single features, of the sites that have them.
    """
    compared, distances = {}, {}
    for site, encoder in encoders.items():
        weighed = weights.get(site)
        named = weighed.named if weighed else None
        here = compared_features(scores.pooled[site], reference.features[site], k, named)
        policy = policy_features(encoder, scores.states[site], here)
        compared[site] = here
        distances[site] = feature_distance(policy, here, k, weighed)
    return compared, distances


def distances_of_groups(
    scores: PairScores,
    reference: ReferenceValues[Tensor],
    k: int,
    weights: Mapping[str, FeatureWeights],
) -> dict[str, Tensor]:
    """The part of D that each named group of features has, as the mean over sites.

    Args:
        scores: the policy's.
        reference: the store's values of the same pairs.
        k: features compared per side.
        weights: of the sites that have groups.

    Returns:
        by group float32 [2, P, 2], without gradient: as if all weights were 1, and with them.
    """
    found: dict[str, Tensor] = {}
    for site, pooled in scores.pooled.items():
        if site in weights:
            here = group_distances(pooled, reference.features[site], k, weights[site])
            for name, parts in here.items():
                found[name] = found.get(name, 0) + parts / len(scores.pooled)
    return found


def objective(
    scores: PairScores,
    reference: ReferenceValues[Tensor],
    encoders: dict[str, SparseEncoder],
    settings: TrainConfig,
    weights: Mapping[str, FeatureWeights] = MappingProxyType({}),
    alpha: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, and the metrics that are logged.

    Args:
        scores: the policy's.
        reference: the store's values of the same pairs.
        encoders: the SAE of each constrained site; empty for methods without the constraint.
        settings: the method and its scalars.
        weights: weights of single features, of the sites that have them.
        alpha: weight of the constraint; None is that of the settings.

    Returns:
        loss float32 [P] with gradient, and metrics by name, each float32 [P] without. Means of the
        metrics `group.NAME.part_SIDE` are for `shares_of_groups`.
    """
    compared, distances = compare_features(scores, reference, encoders, settings.k, weights)
    distance = torch.zeros_like(scores.logp)
    if distances:
        # delta is linear in D, so the mean of D over sites gives the mean of delta.
        distance = torch.stack(list(distances.values())).mean(0)
    # The store's distributions give a lower bound of the KL, and the reference the KL itself.
    kl = scores.kl if scores.kl is not None else scores.kl_bound
    terms = Terms(
        logp=scores.logp,
        count=scores.count,
        ref_logp=reference.logp,
        distance=distance,
        kl=torch.zeros_like(scores.logp) if kl is None else kl,
    )
    loss, u, rewards, divergence, delta = preference_loss(
        terms,
        reward=settings.reward,
        constraint=settings.constraint,
        alpha=settings.alpha if alpha is None else alpha,
        beta=settings.beta,
        gamma=settings.gamma,
        stop_gradient=settings.stop_gradient,
        sft_weight=settings.sft_weight,
        label_smoothing=settings.label_smoothing,
    )
    if scores.router_aux_loss is not None:
        loss = loss + settings.router_aux_loss * scores.router_aux_loss
    reward = REWARDS[settings.reward]
    # A reward is X - X_ref, so this gives |X| + |X_ref|.
    magnitudes = replace(terms, logp=terms.logp.abs(), ref_logp=-terms.ref_logp.abs())
    average, average_ref = scores.average, reference.logp / scores.count
    likelier = wins(average[:, 0], average[:, 1], average.abs().sum(1))
    unscaled = reward(terms)
    preferred = wins(unscaled[:, 0], unscaled[:, 1], reward(magnitudes).sum(1))
    metrics = {
        "loss": loss,
        "u": u,
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "margin": rewards[:, 0] - rewards[:, 1],
        "accuracy": likelier.value,
        "reward_accuracy": preferred.value,
        "reward_ties": preferred.tie,
        "logp_chosen": scores.logp[:, 0],
        "logp_rejected": scores.logp[:, 1],
        "average_logp_chosen": average[:, 0],
        "average_logp_rejected": average[:, 1],
        "average_logp_chosen_change": average[:, 0] - average_ref[:, 0],
    }
    if kl is not None:
        metrics |= {"kl_chosen": kl[:, 0], "kl_rejected": kl[:, 1]}
        metrics["kl_margin"] = (kl[:, 1] - kl[:, 0]).abs()
    if delta is not None:
        metrics["delta"] = delta
    if scores.router_aux_loss is not None:
        # The same for all pairs of a packed sequence.
        metrics["router_aux_loss"] = scores.router_aux_loss.expand_as(loss)
    if settings.hold is not None and divergence is not None:
        metrics |= {"held_chosen": divergence[:, 0], "held": divergence[:, 1]}
    if compared:
        metrics |= {
            "distance_chosen": distance[:, 0],
            "distance_rejected": distance[:, 1],
            "missing": torch.stack(
                [
                    ((~c.stored & c.used).sum(-1) / c.used.sum(-1).clamp(min=1)).mean(1)
                    for c in compared.values()
                ]
            ).mean(0),
            "overlap": torch.stack([c.overlap.mean(1) for c in compared.values()]).mean(0),
        }
    for group, parts in distances_of_groups(scores, reference, settings.k, weights).items():
        for name, part in zip(("distance", "part"), parts, strict=True):
            metrics[f"group.{group}.{name}_chosen"] = part[:, 0]
            metrics[f"group.{group}.{name}_rejected"] = part[:, 1]
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def shares_of_groups(means: dict[str, float]) -> dict[str, float]:
    """Means of the metrics, with each group's part of D as a share of D."""
    shares = {}
    for name, mean in means.items():
        part = _PART.fullmatch(name)
        if part is None:
            shares[name] = mean
        else:
            group, side = part.groups()
            whole = means[f"distance_{side}"]
            shares[f"{group}.share_{side}"] = mean / whole if whole else 0.0
    return shares
