"""Measurements of a policy on pairs of a store."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fpocli.config import TrainConfig
from fpocli.objective import Means, objective
from fpocli.scoring import score
from fpocli.sparse import SparseEncoder
from fpocli.stream import MicroBatch


@torch.no_grad()
def evaluate(
    model: Any,
    encoders: dict[str, SparseEncoder],
    batches: Iterable[MicroBatch],
    settings: TrainConfig,
    weights: Mapping[str, Tensor],
    reference: Any,
) -> dict[str, float]:
    """Means of the training metrics over batches, of all ranks together.

    Args:
        model: the policy, or an engine around it.
        encoders: an SAE for each site that is compared.
        batches: what to score.
        settings: the method and its scalars.
        weights: per-feature weights of the sites that have them.
        reference: the FrozenReference, or an engine around it; with it, the sequential KL is
            measured too, whatever the method. Or None.
    """
    model.eval()
    means = Means()
    for micro in batches:
        expected = reference(micro.batch) if reference is not None else None
        scores = score(model, encoders, micro.batch, expected)
        _, metrics = objective(scores, micro.reference, encoders, settings, weights)
        means.add(metrics, micro.weights)
    return means.result()
