"""The one scoring path: a batch in, per response S, n and pooled features out.

Caching, training and evaluation all come through here. Shapes: P pairs, M scored tokens of the
batch, d model width, m features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpocli.batches import Batch
from fpocli.sparse import SparseEncoder


@dataclass(frozen=True)
class PairScores:
    """What a model says of P pairs; column 0 is chosen, column 1 rejected.

    Args:
        logp: float32 [P, 2], S(y) in nats, with gradient.
        count: float32 [P, 2], n(y).
        pooled: per site float32 [P, 2, m], pooled features without gradient.
        states: per site the hidden states [n, d] of each of the 2P responses, with gradient.
    """

    logp: Tensor
    count: Tensor
    pooled: dict[str, Tensor]
    states: dict[str, tuple[Tensor, ...]]

    @property
    def average(self) -> Tensor:
        """a(y) = S(y) / n(y), [P, 2] in nats per token."""
        return self.logp / self.count


def score(model: Any, encoders: dict[str, SparseEncoder], batch: Batch) -> PairScores:
    """Score the pairs of a batch.

    Every response is reduced on its own, so its numbers do not hang on its neighbours.

    Args:
        model: a LanguageModel, or an engine around one.
        encoders: an SAE for each site of the model that is to be pooled.
        batch: the pairs.
    """
    logprobs, hidden = model(batch)
    counts = batch.counts
    states = {site: hidden[site].split(counts) for site in encoders}
    pooled = {
        site: torch.stack([encoder.pool(response.detach()) for response in states[site]])
        for site, encoder in encoders.items()
    }
    return PairScores(
        logp=torch.stack([tokens.sum() for tokens in logprobs.split(counts)]).view(-1, 2),
        count=torch.tensor(counts, dtype=torch.float32, device=logprobs.device).view(-1, 2),
        pooled={site: value.view(-1, 2, value.shape[-1]) for site, value in pooled.items()},
        states=states,
    )
