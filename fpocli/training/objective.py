"""Scores of the policy and rows of the store -> loss and metrics of each pair.

Shapes: P pairs; column 0 is chosen, column 1 rejected.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpocli.config import TrainConfig
from fpocli.features.distance import (
    Candidates,
    StoredFeatures,
    candidates,
    feature_distance,
    policy_features,
)
from fpocli.features.encoder import SparseEncoder
from fpocli.scoring.score import PairScores
from fpocli.system.errors import UserError, told_once
from fpocli.training.losses import METHODS, Terms

# The most pairs that an error names.
_NAMED = 8


@dataclass(frozen=True)
class ReferenceRows:
    """The store's rows of P pairs.

    Args:
        logp: float32 [P, 2], S_ref in nats.
        margin: float32 [P], nats per token.
        features: by site.
    """

    logp: Tensor
    margin: Tensor
    features: dict[str, StoredFeatures]


class Means:
    """Means of metrics over the pairs of a step, gathered from micro-batches and ranks."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._finite: list[tuple[np.ndarray, Tensor]] = []

    def add(self, metrics: dict[str, Tensor], weights: Tensor, pairs: np.ndarray) -> None:
        """Add P pairs.

        Args:
            metrics: float32 [P] each; the same names every time.
            weights: float32 [P], what each pair counts in the mean.
            pairs: int64 [P], their numbers in the store.
        """
        self._names = list(metrics)
        values = torch.stack(list(metrics.values()))
        sums = values.double() @ weights.double()
        self._sums = sums if self._sums is None else self._sums + sums
        # Looked at only if a mean turns out not to be finite: a look waits for the device.
        self._finite.append((pairs, values.isfinite().all(0)))

    def result(self, where: str) -> dict[str, float]:
        """The means. Every rank must ask for them, as often as the others.

        Args:
            where: what the pairs are, for the error.

        Raises:
            UserError: a mean is not finite; it names the pairs. All ranks stop.
        """
        if self._sums is None:
            return {}
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        means = dict(zip(self._names, self._sums.tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise self._not_finite(f"{where}: {name} is {mean}")
        return means

    def _not_finite(self, what: str) -> BaseException:
        pairs = [number for own, finite in self._finite for number in own[~finite.cpu().numpy()]]
        rank = 0
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, pairs)
            pairs = [number for own in everywhere for number in own]
        named = [str(number) for number in sorted(set(pairs))]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        error = UserError(
            f"{what}, from the pairs {', '.join(named[:_NAMED])}{more} of the store",
            "look at one with fpo inspect --pair; if it is sound, begin a run with a lower --lr, "
            "in another --out or with --overwrite",
        )
        return told_once(error, rank == 0)


def compare(
    scores: PairScores,
    reference: ReferenceRows,
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
    reference: ReferenceRows,
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
    compared, distances = compare(scores, reference, encoders, settings.k, weights)
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
