"""Appendix B's upper bound on the KL by the change of the features.

Per position: KL(reference || policy) <= M^2 / 2 ||c_policy - c_reference||^2 (equations 23
to 25), with M = ||W_out W_dec^T||_2. It holds where the SAE reconstructs the states, where the
logits are W_out times the hidden state at the site, and for small changes: at best at the last
layer, and even there a final norm and a soft-cap come in between. It is reported, never used.

Shapes: n positions of one response, d model width, m features, V vocabulary.
"""

import torch
from torch import Tensor

from fpocli.features.encoder import SparseEncoder


def operator_norm(head: Tensor, decoder: Tensor) -> float:
    """M, the largest singular value of W_out W_dec^T, without forming that matrix.

    Args:
        head: [V, d] weight of the head.
        decoder: [m, d] of the SAE.
    """
    # Its square is the largest eigenvalue of A^(1/2) B A^(1/2), both Gram matrices [d, d].
    outer, inner = (_gram(weight) for weight in (head, decoder))
    values, vectors = torch.linalg.eigh(outer)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return float(torch.linalg.eigvalsh(root @ inner @ root)[-1].clamp(min=0).sqrt())


def _gram(weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in weight.detach().split(2**14):
        total += (rows.T.double() @ rows.double()).cpu()
    return total


@torch.no_grad()
def squared_change(encoder: SparseEncoder, policy: Tensor, reference: Tensor) -> Tensor:
    """sum over positions of ||c_policy - c_reference||^2, a scalar.

    Args:
        encoder: the site's SAE.
        policy, reference: hidden states [n, d] of a response at the site.
    """
    total = torch.zeros((), device=policy.device)
    for own, other in zip(encoder.chunks(policy), encoder.chunks(reference), strict=True):
        total += (encoder.sae.encode(own) - encoder.sae.encode(other)).square().sum()
    return total
