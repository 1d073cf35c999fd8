"""The training metrics of the held-out pairs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fpocli.config import TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.features.weights import FeatureWeights
from fpocli.scoring.score import score
from fpocli.training.means import Means
from fpocli.training.objective import objective, shares_of_groups
from fpocli.training.pair_loader import MicroBatch


@torch.no_grad()
def held_out_means(
    model: Any,
    encoders: dict[str, SparseEncoder],
    batches: Iterable[MicroBatch],
    settings: TrainConfig,
    weights: Mapping[str, FeatureWeights],
    reference: Any,
    where: str,
    alpha: float | None = None,
) -> dict[str, float]:
    """Means of the training metrics over batches, of all ranks together.

    Args:
        model: the policy, or an engine around it.
        encoders: an SAE for each site that is compared.
        batches: what to score.
        settings: the method and its scalars.
        weights: weights of single features, of the sites that have them.
        reference: the FrozenReference, or an engine around it, to measure the sequential KL
            exactly; or None.
        where: which pairs these are, for the error.
        alpha: weight of the constraint; None is that of the settings.

    Raises:
        UserError: a mean is non-finite.
    """
    model.eval()
    means = Means()
    for micro in batches:
        output = reference(micro.batch) if reference is not None else None
        scores = score(model, encoders, micro.batch, output, micro.top)
        _, metrics = objective(scores, micro.reference, encoders, settings, weights, alpha)
        means.add(metrics, micro.pair_weights, micro.pairs)
    return shares_of_groups(means.result(where))
