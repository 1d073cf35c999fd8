"""The feature distance D (paper, equation 10) against a store that holds the top K of each vector.

Shapes: P pairs, m features, K stored features, k compared features, J = 2k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fpocli.features.encoder import SparseEncoder, top_k
from fpocli.features.top_features import TopFeatures


@dataclass(frozen=True)
class ComparedFeatures:
    """The union I = top_k(policy) with top_k(reference), padded to J.

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


def compared_features(pooled: Tensor, reference: TopFeatures[Tensor], k: int) -> ComparedFeatures:
    """The features that D compares, with what the store holds of the reference there.

    A feature that is 0 on one side is not in that side's top k; it would add nothing to D.

    Args:
        pooled: float32 [P, 2, m], the policy's.
        reference: the store's values of the same pairs.
        k: features compared per side; the store must hold as many or all.
    """
    own, own_value = top_k(pooled, min(k, pooled.shape[-1]))
    top, top_value = reference.index[..., :k], reference.value[..., :k]
    # [P, 2, k, K]: where in the store, if anywhere, each of the policy's top features is.
    match = (own[..., :, None] == reference.index[..., None, :]) & (own_value > 0)[..., None]
    found = match.any(-1)
    # Not where the stored value is 0, as tiny values are in float16: `top` leaves them out.
    in_top = (match[..., :k] & (top_value > 0)[..., None, :]).any(-1)
    floor = torch.where(
        reference.nonzero <= reference.value.shape[-1], 0, reference.value[..., -1]
    )[..., None]
    own_stored = found | (floor == 0)
    own_reference = torch.where(found, (match * reference.value[..., None, :]).sum(-1), floor)
    used = torch.cat([top_value > 0, (own_value > 0) & ~in_top], -1)
    size = torch.maximum((top_value > 0).sum(-1), (own_value > 0).sum(-1)).clamp(min=1)
    return ComparedFeatures(
        index=torch.where(used, torch.cat([top, own], -1), 0),
        used=used,
        stored=torch.cat([torch.ones_like(top, dtype=torch.bool), own_stored], -1),
        value=torch.cat([top_value, own_reference], -1),
        overlap=in_top.sum(-1) / size,
    )


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
    policy: Tensor, compared: ComparedFeatures, k: int, weights: Tensor | None = None
) -> Tensor:
    """D(y) = (1/k) sum over I of omega (policy - reference)^2 (paper, equation 10; v4 numbering;
    omega: section 5.3).

    A value that the store lacks lies in [0, compared.value]. The nearest point of that interval is
    used, which makes D the tightest lower bound, continuous, and 0 at step 0.

    Args:
        policy: float32 [P, 2, J], the policy's values of these features.
        compared: the features.
        k: the paper's k.
        weights: omega, float32 [m]; None is 1 for all.

    Returns:
        float32 [P, 2].
    """
    nearest = torch.minimum(policy.detach(), compared.value)
    reference = torch.where(compared.stored, compared.value, nearest)
    squares = torch.where(compared.used, policy - reference, 0) ** 2
    if weights is not None:
        squares = weights[compared.index] * squares
    return squares.sum(-1) / k
