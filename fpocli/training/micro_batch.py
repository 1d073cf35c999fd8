"""What one rank scores in one forward pass: packed pairs, and the store's values as tensors.

Shapes: P pairs of a packed sequence.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpocli.data.top_tokens import TopTokens
from fpocli.features.top_features import TopFeatures
from fpocli.model.packing import PackedSequence
from fpocli.store.records import ReferenceValues


@dataclass(frozen=True)
class MicroBatch:
    """What one rank scores in one forward pass.

    Args:
        pairs: int64 [P], their numbers in the store.
        batch: the packed sequence.
        reference: the store's values of the same pairs.
        pair_weights: float32 [P], weight of each pair in the mean over the step; 0 for a pair that
            is only there so that a rank without work takes part in the collectives.
        tokens: float32 [P], tokens of each pair, the prompt once.
        top: the store's distributions of the reference at the scored positions, if asked for.
    """

    pairs: np.ndarray
    batch: PackedSequence
    reference: ReferenceValues
    pair_weights: Tensor
    tokens: Tensor
    top: TopTokens[Tensor] | None


def top_tensors(top: TopTokens[np.ndarray], device: torch.device) -> TopTokens[Tensor]:
    """Distributions as tensors on a device."""
    ids = None if top.ids is None else torch.from_numpy(top.ids.astype(np.int64)).to(device)
    logp, rest = (torch.from_numpy(values).to(device) for values in (top.logp, top.rest))
    return TopTokens(ids, logp, rest)


def reference_tensors(
    places: list[tuple[ReferenceValues, int]], device: torch.device
) -> ReferenceValues[Tensor]:
    """The values of pairs from several blocks, as tensors."""

    def gather(arrays: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.array(arrays, dtype)).to(device)

    sites = places[0][0].features

    def features(site: str) -> TopFeatures[Tensor]:
        kept = torch.from_numpy(places[0][0].features[site].kept).to(device)
        index, value, nonzero, kept_value = (
            gather([getattr(ref.features[site], name)[row] for ref, row in places], dtype)
            for name, dtype in (
                ("index", np.int64),
                ("value", np.float32),
                ("nonzero", np.int64),
                ("kept_value", np.float32),
            )
        )
        return TopFeatures(index, value, nonzero, kept_value, kept)

    return ReferenceValues(
        logp=gather([reference.logp[row] for reference, row in places], np.float32),
        margin=gather([reference.margin[row] for reference, row in places], np.float32),
        features={site: features(site) for site in sites},
    )
