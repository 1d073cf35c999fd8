"""The feature distance D (paper, equation 10) against a store that holds the top K of each vector.

Shapes: P pairs, m features, K stored features, k compared features, F named features, J = 2k + F.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpocli.features.encoder import SparseEncoder, top_k
from fpocli.features.top_features import TopFeatures
from fpocli.features.weights import FeatureWeights


@dataclass(frozen=True)
class ComparedFeatures:
    """The union I = top_k(policy) with top_k(reference) with the named features, padded to J.

    Args:
        index: int64 [P, 2, J]; 0 where `used` is False.
        used: bool [P, 2, J].
        stored: bool [P, 2, J], whether the store holds the reference's value.
        value: float32 [P, 2, J], that value; where it is missing, the largest it can be.
        overlap: float32 [P, 2], share of the two top-k sets that they have in common.
    """

    index: Tensor
    used: Tensor
    stored: Tensor
    value: Tensor
    overlap: Tensor


def compared_features(
    pooled: Tensor, reference: TopFeatures[Tensor], k: int, named: Tensor | None = None
) -> ComparedFeatures:
    """The features that D compares, with what the store holds of the reference there.

    A feature that is 0 on one side is not in that side's top k; it would add nothing to D.

    Args:
        pooled: float32 [P, 2, m], the policy's.
        reference: the store's values of the same pairs.
        k: features compared per side; the store must hold as many or all.
        named: int64 [F], features that are compared in every response (section 5.3).
    """
    own, own_value = top_k(pooled, min(k, pooled.shape[-1]))
    top, top_value = reference.index[..., :k], reference.value[..., :k]
    # Not where the stored value is 0, as tiny values are in float16: `top` leaves them out.
    in_top = (own_value > 0) & _are_in(own, top, top_value > 0)
    index = torch.cat([top, own], -1)
    used = torch.cat([top_value > 0, (own_value > 0) & ~in_top], -1)
    if named is not None:
        extra = named.expand(*pooled.shape[:2], -1)
        used = torch.cat([used, ~_are_in(extra, index, used)], -1)
        index = torch.cat([index, extra], -1)
    value, stored = reference_values(index[..., top.shape[-1] :], reference, pooled.shape[-1])
    size = torch.maximum((top_value > 0).sum(-1), (own_value > 0).sum(-1)).clamp(min=1)
    return ComparedFeatures(
        index=torch.where(used, index, 0),
        used=used,
        stored=torch.cat([torch.ones_like(top, dtype=torch.bool), stored], -1),
        value=torch.cat([top_value, value], -1),
        overlap=in_top.sum(-1) / size,
    )


def reference_values(
    index: Tensor, reference: TopFeatures[Tensor], m: int
) -> tuple[Tensor, Tensor]:
    """What the store holds of the reference at some features.

    Args:
        index: int64 [P, 2, q], the features.
        reference: the store's values of the same pairs.
        m: features of the SAE.

    Returns:
        float32 [P, 2, q], the value, or the largest that it can be if it is missing;
        bool [P, 2, q], whether it is known.
    """
    smallest = reference.value[..., -1:]
    floor = torch.where(reference.nonzero[..., None] <= reference.value.shape[-1], 0, smallest)
    # Unused slots hold an index beyond m; they are written to one more column.
    slots = reference.index.clamp(max=m)
    values = floor.repeat(1, 1, m + 1).scatter_(-1, slots, reference.value)
    known = (floor == 0).repeat(1, 1, m + 1).scatter_(-1, slots, True)
    kept = reference.kept.expand_as(reference.kept_value)
    values.scatter_(-1, kept, reference.kept_value)
    known.scatter_(-1, kept, True)
    return values.gather(-1, index), known.gather(-1, index)


def _are_in(index: Tensor, others: Tensor, used: Tensor) -> Tensor:
    """Which of `index` [P, 2, q] are among the used ones of `others` [P, 2, r]: bool [P, 2, q]."""
    return ((index[..., :, None] == others[..., None, :]) & used[..., None, :]).any(-1)


def policy_features(
    encoder: SparseEncoder, states: tuple[Tensor, ...], compared: ComparedFeatures
) -> Tensor:
    """The policy's values of the compared features, with gradient: float32 [P, 2, J].

    Args:
        encoder: the site's SAE.
        states: hidden states [n, d] of each of the 2P responses.
        compared: the features.
    """
    index, used = compared.index.flatten(0, 1), compared.used.flatten(0, 1)
    rows = []
    for response, columns, keep in zip(states, index, used, strict=True):
        values = encoder.pool_selected(response, columns[keep])
        rows.append(values.new_zeros(len(keep)).masked_scatter(keep, values))
    return torch.stack(rows).view_as(compared.value)


def feature_distance(
    policy: Tensor, compared: ComparedFeatures, k: int, weights: FeatureWeights | None = None
) -> Tensor:
    """D(y) = (1/k) sum over I of omega (policy - reference)^2 (paper, equation 10; v4 numbering;
    omega: section 5.3).

    A value that the store lacks lies in [0, compared.value]. The nearest point of that interval is
    used, which makes D the tightest lower bound, continuous, and 0 at step 0.

    Args:
        policy: float32 [P, 2, J], the policy's values of these features.
        compared: the features.
        k: the paper's k.
        weights: omega and directions; None is 1 and both for all.

    Returns:
        float32 [P, 2].
    """
    change = policy - _nearest(policy, compared.value, compared.stored)
    return _penalty(torch.where(compared.used, change, 0), compared.index, weights).sum(-1) / k


def group_distances(
    pooled: Tensor, reference: TopFeatures[Tensor], k: int, weights: FeatureWeights
) -> dict[str, Tensor]:
    """The part of D that each group of features has.

    Args:
        pooled: float32 [P, 2, m], the policy's.
        reference: the store's values of the same pairs.
        k: the paper's k.
        weights: the groups, omega and directions.

    Returns:
        by group float32 [2, P, 2], without gradient: as if all weights were 1, and with them.
    """
    index = weights.named.expand(*pooled.shape[:2], -1)
    policy = pooled.gather(-1, index)
    change = policy - _nearest(policy, *reference_values(index, reference, pooled.shape[-1]))
    parts = torch.stack([_penalty(change, index, omega) for omega in (None, weights)])
    return {
        name: parts[..., torch.searchsorted(weights.named, features)].sum(-1) / k
        for name, features in weights.groups.items()
    }


def _nearest(policy: Tensor, value: Tensor, stored: Tensor) -> Tensor:
    """The reference's value, or the nearest that it can be."""
    return torch.where(stored, value, torch.minimum(policy.detach(), value))


def _penalty(change: Tensor, index: Tensor, weights: FeatureWeights | None) -> Tensor:
    """omega times the squared change, in the penalised direction only."""
    squares = change**2
    if weights is None:
        return squares
    direction = weights.direction[index]
    penalised = (direction == 0) | (change * direction > 0)
    return weights.weight[index] * torch.where(penalised, squares, 0)
