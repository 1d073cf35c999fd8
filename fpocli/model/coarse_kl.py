"""The KL between next-token distributions of which one is known at its n likeliest tokens alone.

    K~ = sum over the n of p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest)

All other tokens are lumped into one, the rest. Merging outcomes never raises a KL (data processing
inequality), so K~ is a lower bound of KL(p || q). It is 0 for equal distributions, rises with n and
is exact at n = V.

Shapes: M positions, n tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from fpocli.data.top_tokens import TopTokens


def coarse_logprobs(logits: Tensor, targets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q of one token, of n tokens, and of all but these n together.

    The last one is summed over the other tokens: one minus the sum of the n would cancel.

    Args:
        logits: float32 [M, V].
        targets: int64 [M].
        ids: int64 [M, n], n < V.

    Returns:
        float32 [M], [M, n] and [M], nats.
    """
    logp, top, rest = _CoarseLogprobs.apply(logits, targets, ids)
    return logp, top, rest


def top_tokens(logits: Tensor, targets: Tensor, n: int) -> tuple[Tensor, TopTokens[Tensor]]:
    """log q of one token, and the n likeliest tokens; without gradient.

    The n come from torch.topk. Which of two equally likely tokens is among them is not defined, but
    the same for the same logits.

    Args:
        logits: float32 [M, V].
        targets: int64 [M].
        n: how many; V for the whole vocabulary.
    """
    if n == logits.shape[-1]:
        whole = logits.log_softmax(-1)
        none = torch.full_like(whole[:, 0], -torch.inf)
        return whole.gather(-1, targets[:, None])[:, 0], TopTokens(None, whole, none)
    ids = logits.topk(n, -1).indices
    logp, top, rest = coarse_logprobs(logits, targets, ids)
    return logp, TopTokens(ids, top, rest)


def coarse_kl(logits: Tensor, targets: Tensor, known: TopTokens[Tensor]) -> tuple[Tensor, Tensor]:
    """log q of one token, and K~, both float32 [M] in nats with gradient to the logits.

    Args:
        logits: float32 [M, V], of q.
        targets: int64 [M].
        known: of p.
    """
    if known.ids is None:
        top = logits.log_softmax(-1)
        logp, rest = top.gather(-1, targets[:, None])[:, 0], known.rest
    else:
        logp, top, rest = coarse_logprobs(logits, targets, known.ids)
    # What has probability 0 adds 0.
    of_top = torch.where(known.logp == -torch.inf, 0, known.logp.exp() * (known.logp - top))
    of_rest = torch.where(known.rest == -torch.inf, 0, known.rest.exp() * (known.rest - rest))
    return logp, of_top.sum(-1) + of_rest


class _CoarseLogprobs(torch.autograd.Function):
    """`coarse_logprobs`: two temporaries [M, V] in the forward pass, one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ids: Tensor) -> Any:
        others = logits.log_softmax(-1)
        logp = others.gather(-1, targets[:, None])[:, 0]
        top = others.gather(-1, ids)
        # The lowest number instead of -inf, which a softmax of nothing else would turn into NaN.
        lowest = torch.finfo(others.dtype).min
        others.scatter_(-1, ids, lowest)
        # q_j / q_rest. A softmax sums each row in an order of its own, whatever the other rows;
        # torch.logsumexp does not, and equal rows would get unequal rests.
        shares = others.softmax(-1)
        most = others.amax(-1)
        # Where all others have probability 0, so has the rest.
        rest = torch.where(most == lowest, -torch.inf, most - shares.amax(-1).log())
        ctx.save_for_backward(shares, top, rest, targets, ids)
        return logp, top, rest

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        of_target, of_top, of_rest = slopes
        shares, top, rest, targets, ids = ctx.saved_tensors
        # Of each slope g, d log q_j / d z = g (1 - q), so all q are scaled by minus their sum. With
        # q_rest factored out nothing divides by it, however small it is.
        scale = -(of_target + of_top.sum(-1) + of_rest)
        slope = shares * (scale * rest.exp() + of_rest)[:, None]
        slope.scatter_(-1, ids, scale[:, None] * top.exp() + of_top)
        slope.scatter_add_(-1, targets[:, None], of_target[:, None])
        return slope, None, None
