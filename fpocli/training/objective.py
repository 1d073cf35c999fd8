"""Scores of the policy and rows of the store -> loss and metrics of each pair.

Shapes: P pairs; column 0 is chosen, column 1 rejected.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fpocli.config import TrainConfig
from fpocli.features.distance import Candidates, candidates, feature_distance, policy_features
from fpocli.features.encoder import SparseEncoder
from fpocli.scoring.score import PairScores
from fpocli.store.records import ReferenceValues
from fpocli.training.losses import METHODS, Terms


def compare_features(
    scores: PairScores,
    reference: ReferenceValues[Tensor],
    encoders: dict[str, SparseEncoder],
    k: int,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Candidates], dict[str, Tensor]]:
    """What is compared at each site, and D there, float32 [P, 2] with gradient.

    Args:
        scores: the policy's.
        reference: rows of the same pairs.
        encoders: the SAE of each site.
        k: features compared per side.
        weights: per-feature weights float32 [m] of the sites that have them.
    """
    compared, distances = {}, {}
    for site, encoder in encoders.items():
        chosen = candidates(scores.pooled[site], reference.features[site], k)
        policy = policy_features(encoder, scores.states[site], chosen)
        compared[site] = chosen
        distances[site] = feature_distance(policy, chosen, k, weights.get(site))
    return compared, distances


def objective(
    scores: PairScores,
    reference: ReferenceValues[Tensor],
    encoders: dict[str, SparseEncoder],
    settings: TrainConfig,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair and everything that is logged about it.

    Args:
        scores: the policy's.
        reference: rows of the same pairs.
        encoders: the SAE of each site the method constrains; none for the other methods.
        settings: the method and its scalars.
        weights: per-feature weights float32 [m] of the sites that have them.

    Returns:
        loss float32 [P] with gradient, and metrics by name, each float32 [P] without.
    """
    compared, distances = compare_features(scores, reference, encoders, settings.k, weights)
    distance = torch.zeros_like(scores.logp)
    if distances:
        # The mean over sites of D gives the mean over sites of delta, which is linear in D.
        distance = torch.stack(list(distances.values())).mean(0)
    terms = Terms(
        logp=scores.logp,
        count=scores.count,
        ref_logp=reference.logp,
        ref_margin=reference.margin,
        distance=distance,
        kl=torch.zeros_like(scores.logp) if scores.kl is None else scores.kl,
    )
    loss, (u, rewards, delta) = METHODS[settings.method].loss(terms, settings)
    chosen, rejected = rewards.unbind(1)
    metrics = {
        "loss": loss,
        "u": u,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (scores.average[:, 0] > scores.average[:, 1]).float(),
        "reward_accuracy": (chosen > rejected).float(),
        "logp_chosen": scores.logp[:, 0],
        "logp_rejected": scores.logp[:, 1],
        "average_logp_chosen": scores.average[:, 0],
        "average_logp_rejected": scores.average[:, 1],
    }
    if scores.kl is not None:
        metrics |= {"kl_chosen": scores.kl[:, 0], "kl_rejected": scores.kl[:, 1]}
    if delta is not None:
        metrics["delta"] = delta
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
    return loss, {name: value.detach().float() for name, value in metrics.items()}
