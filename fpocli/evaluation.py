"""Measurements of a policy on pairs of a store. Shapes: P pairs, M scored tokens, V vocabulary."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fpocli.batches import Batch
from fpocli.config import TrainConfig
from fpocli.head import chunk_size, logits
from fpocli.model import LanguageModel
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
    reference: LanguageModel | None = None,
) -> dict[str, float]:
    """Means of the training metrics over batches, of all ranks together.

    Args:
        model: the policy, or an engine around it.
        encoders: an SAE for each site that is compared.
        batches: what to score.
        settings: the method and its weights.
        reference: the frozen reference; with it, the sequential KL is measured too.
    """
    model.eval()
    means = Means()
    for micro in batches:
        _, metrics = objective(
            score(model, encoders, micro.batch), micro.reference, encoders, settings
        )
        if reference is not None:
            kl = sequential_kl(reference, model, micro.batch)
            metrics |= {"kl_chosen": kl[:, 0], "kl_rejected": kl[:, 1]}
        means.add(metrics, micro.weights)
    return means.result()


@torch.no_grad()
def sequential_kl(reference: LanguageModel, policy: LanguageModel, batch: Batch) -> Tensor:
    """K(y) = sum over the response's positions of KL(reference || policy), nats, float32 [P, 2].

    Paper, the definition after equation 3 (TDPO). Both heads run chunk by chunk.
    """
    expected, _ = reference.states(batch)
    actual, _ = policy.states(batch)
    divergences = []
    size = chunk_size(policy.network)
    for one, other in zip(expected.split(size), actual.split(size), strict=True):
        target = F.log_softmax(logits(reference.network, one), -1)
        guess = F.log_softmax(logits(policy.network, other), -1)
        divergences.append(F.kl_div(guess, target, reduction="none", log_target=True).sum(-1))
    per_response = torch.cat(divergences).split(batch.counts)
    return torch.stack([tokens.sum() for tokens in per_response]).view(-1, 2)
