"""The one scoring path: a packed sequence in; S, n and pooled features of every response out.

Caching, training and evaluation all use it. Shapes: P pairs, M scored tokens, n of one response,
d model width, m features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpocli.data.top_tokens import TopTokens
from fpocli.features.encoder import SparseEncoder
from fpocli.model.language_model import ModelOutput, ReferenceOutput
from fpocli.model.packing import PackedSequence


@dataclass(frozen=True)
class PairScores:
    """A model's scores of P pairs; column 0 is chosen, column 1 rejected.

    Args:
        logp: float32 [P, 2], S(y) in nats, with gradient.
        count: float32 [P, 2], n(y).
        pooled: per site float32 [P, 2, m], pooled features without gradient.
        states: per site the hidden states [n, d] of each of the 2P responses, with gradient.
        kl: float32 [P, 2], K(y), the sequential KL(reference || policy) in nats (paper, the
            definition after equation 3), with gradient; None without a reference.
        kl_bound: float32 [P, 2], its lower bound by a store's distributions, nats, with gradient;
            None without them.
        top: the model's own distributions at the M scored tokens, or None.
        router_aux_loss: float32 scalar, the auxiliary loss of the routers over all tokens of the
            packed sequence, with gradient; None unless the model is trained with it.
    """

    logp: Tensor
    count: Tensor
    pooled: dict[str, Tensor]
    states: dict[str, tuple[Tensor, ...]]
    kl: Tensor | None
    kl_bound: Tensor | None
    top: TopTokens[Tensor] | None
    router_aux_loss: Tensor | None

    @property
    def average(self) -> Tensor:
        """a(y) = S(y) / n(y), [P, 2] in nats per token."""
        return self.logp / self.count


def score(
    model: Any,
    encoders: dict[str, SparseEncoder],
    batch: PackedSequence,
    reference: ReferenceOutput | None = None,
    top: TopTokens[Tensor] | None = None,
    *,
    distributions: int = 0,
) -> PairScores:
    """Score the pairs of a packed sequence.

    Every response is reduced separately, so its scores do not depend on its neighbours.

    Args:
        model: a LanguageModel, or a DeepSpeed engine around one.
        encoders: an SAE for each site whose features are pooled.
        batch: the packed sequence.
        reference: the frozen reference's output for it, if the KL is needed.
        top: the store's distributions of the reference for it, if the KL's lower bound is needed.
        distributions: of how many tokens the model's own distributions are returned; V for the
            whole vocabulary.
    """
    return reduce_to_pairs(model(batch, reference, top, distributions), encoders, batch.counts)


def reduce_to_pairs(
    output: ModelOutput, encoders: dict[str, SparseEncoder], counts: list[int]
) -> PairScores:
    """A model's output at the scored positions as scores of P pairs.

    Args:
        output: of the M scored tokens, grouped by response: chosen and rejected of the first pair,
            then of the next.
        encoders: an SAE for each site whose features are pooled.
        counts: n(y) of the 2P responses.
    """

    def sums(tokens: Tensor) -> Tensor:
        return torch.stack([response.sum() for response in tokens.split(counts)]).view(-1, 2)

    states = {site: output.states[site].split(counts) for site in encoders}
    pooled = {
        site: torch.stack([encoder.pool(response.detach()) for response in states[site]])
        for site, encoder in encoders.items()
    }
    return PairScores(
        logp=sums(output.logp),
        count=torch.tensor(counts, dtype=torch.float32, device=output.logp.device).view(-1, 2),
        pooled={site: value.view(-1, 2, value.shape[-1]) for site, value in pooled.items()},
        states=states,
        kl=None if output.kl is None else sums(output.kl),
        kl_bound=None if output.kl_bound is None else sums(output.kl_bound),
        top=output.top,
        router_aux_loss=output.router_aux_loss,
    )
