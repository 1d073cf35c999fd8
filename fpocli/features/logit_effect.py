"""Weights of the features by their effect on the logits, so that D is nearer to the KL.

Appendix B bounds the KL by the change of the features, with one factor for all of them. For a small
change of the logits by dz the KL itself is 1/2 Var_p(dz), where p is the next-token distribution
(a shift of all logits changes nothing). If feature i changes by c, the residual stream changes by
c W_dec,i, and the logits, by way of the final norm's gain g alone, by c d_i with
d_i = W_out (g * W_dec,i); a norm that removes the mean, as LayerNorm does, removes that of W_dec,i.
So its effect is Var_p(d_i), and omega_i is that, with one p for all positions. What the layers in
between, the norm's division and a soft-cap do is left out.

Shapes: V vocabulary, d model width, m features.
"""

import torch
from torch import Tensor

# Rows that are multiplied at once.
_ROWS = 2**14


@torch.no_grad()
def logit_effect(
    head: Tensor, gain: Tensor, decoder: Tensor, tokens: Tensor, *, centred: bool
) -> Tensor:
    """omega, divided by its mean, so that alpha keeps its order of magnitude: float32 [m].

    The variances come from one matrix [d, d], so that no [V, m] exists.

    Args:
        head: [V, d] weight of the head.
        gain: [d] of the final norm.
        decoder: [m, d] of the SAE.
        tokens: [V], how often each token occurs; at least 0, and not all 0.
        centred: whether the final norm removes the mean.
    """
    share = (tokens.double() / tokens.double().sum()).to(head.device)
    mean = torch.zeros(head.shape[1], dtype=torch.float64, device=head.device)
    square = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=head.device)
    for rows, part in zip(head.split(_ROWS), share.split(_ROWS), strict=True):
        mean += part @ rows.double()
        square += (rows.double().T * part) @ rows.double()
    covariance = square - mean[:, None] * mean
    effects = []
    for rows in decoder.split(_ROWS):
        states = rows.double().to(head.device)
        if centred:
            states = states - states.mean(1, keepdim=True)
        states = states * gain.double()
        effects.append(((states @ covariance) * states).sum(-1).clamp(min=0))
    omega = torch.cat(effects)
    return (omega / omega.mean()).float()
