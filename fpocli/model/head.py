"""The head: hidden states -> log-probabilities, without ever holding all logits in memory.

Shapes: M scored tokens, d model width, V vocabulary, n tokens of a stored distribution.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fpocli.data.top_tokens import TopTokens
from fpocli.model.coarse_kl import coarse_kl, top_tokens

CHUNKED, LIGER = "chunked", "liger"
_LIGER_SINCE = Version("0.8.5")
# Most bytes of one chunk's logits in float32; on a CPU they should fit into its cache.
_CHUNK_BYTES, _CHUNK_BYTES_CPU = 256 * 2**20, 24 * 2**20


def choose_head(network: Any) -> str:
    """How `logprobs` is computed: by Liger's fused kernel on a GPU if liger-kernel is installed,
    else chunk by chunk. Under ZeRO-3 no rank has the whole weight, so it is chunked there."""
    return usable_heads(network)[0]


def usable_heads(network: Any) -> list[str]:
    """The heads that can compute `logprobs` for a network, the preferred one first."""
    head = network.get_output_embeddings()
    whole = head.bias is None and not hasattr(head.weight, "ds_id")
    fused = network.device.type == "cuda" and whole and _liger_serves()
    return [LIGER, CHUNKED] if fused else [CHUNKED]


@cache
def _liger_serves() -> bool:
    """Whether liger-kernel is installed, and new enough for a gradient per token."""
    try:
        return Version(version("liger-kernel")) >= _LIGER_SINCE
    except PackageNotFoundError:
        return False


def logprobs(network: Any, final: Tensor, targets: Tensor, head: str | None = None) -> Tensor:
    """log pi(target) at every predicting position. Logits are recomputed in the backward pass.

    Args:
        network: transformers' model.
        final: [M, d] the head's input.
        targets: [M] token ids.
        head: CHUNKED or LIGER; None for that of `choose_head`.

    Returns:
        float32 [M], nats.
    """
    if (head or choose_head(network)) == LIGER:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        weight = network.get_output_embeddings().weight
        return -liger_fused_linear_cross_entropy(
            final,
            weight,
            targets,
            reduction="none",
            softcap=soft_cap(network),
            accum_dtype=torch.float32,
        )

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor]:
        return (-F.cross_entropy(logits(network, states), tokens, reduction="none"),)

    (values,) = _by_chunk(chunk, network, final, targets)
    return values


def logprobs_and_kl(
    network: Any, final: Tensor, targets: Tensor, reference: Any, reference_final: Tensor
) -> tuple[Tensor, Tensor]:
    """log pi(target), and KL(reference || policy) of the next-token distributions, at every
    predicting position.

    Both heads run chunk by chunk, the policy's logits are used for both results, and the chunks
    are recomputed in the backward pass. The reference has no gradient.

    Args:
        network: the policy's.
        final: [M, d] its head's input.
        targets: [M] token ids.
        reference: the reference's network.
        reference_final: [M, d] the input of the reference's head.

    Returns:
        two float32 [M], nats.
    """

    def chunk(states: Tensor, tokens: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        guess = F.log_softmax(logits(network, states), -1)
        with torch.no_grad():
            target = F.log_softmax(logits(reference, other), -1)
        divergence = F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)
        return guess.gather(-1, tokens[:, None])[:, 0], divergence

    logp, kl = _by_chunk(chunk, network, final, targets, reference_final)
    return logp, kl


def logprobs_and_top(
    network: Any, final: Tensor, targets: Tensor, n: int
) -> tuple[Tensor, TopTokens[Tensor]]:
    """log pi(target), and the n likeliest tokens, at every predicting position; for caching.

    Args:
        network: transformers' model.
        final: [M, d] the head's input.
        targets: [M] token ids.
        n: how many tokens; V for the whole vocabulary.

    Returns:
        float32 [M], nats; TopTokens.
    """

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logp, top = top_tokens(logits(network, states), tokens, n)
        return logp, *top.arrays.values()

    logp, *ids, top, rest = _by_chunk(chunk, network, final, targets)
    return logp, TopTokens(ids[0] if ids else None, top, rest)


def logprobs_and_bound(
    network: Any, final: Tensor, targets: Tensor, known: TopTokens[Tensor]
) -> tuple[Tensor, Tensor]:
    """log pi(target), and the lower bound of KL(reference || policy) that a store's distributions
    give, at every predicting position. Chunks are recomputed in the backward pass.

    Args:
        network: the policy's.
        final: [M, d] its head's input.
        targets: [M] token ids.
        known: of the reference at these positions.

    Returns:
        two float32 [M], nats.
    """

    def chunk(states: Tensor, tokens: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        *ids, top, rest = parts
        here = TopTokens(ids[0] if ids else None, top, rest)
        return coarse_kl(logits(network, states), tokens, here)

    logp, bound = _by_chunk(chunk, network, final, targets, *known.arrays.values())
    return logp, bound


def _by_chunk(
    chunk: Callable[..., tuple[Tensor, ...]], network: Any, *rows: Tensor
) -> list[Tensor]:
    """Apply `chunk` to all rows, as many at a time as `chunk_size` allows, and concatenate."""
    parts = zip(*(part.split(chunk_size(network)) for part in rows), strict=True)
    if torch.is_grad_enabled():
        results = [checkpoint(chunk, *part, use_reentrant=False) for part in parts]
    else:
        results = [chunk(*part) for part in parts]
    return [torch.cat(result) for result in zip(*results, strict=True)]


def logits(network: Any, final: Tensor) -> Tensor:
    """The head with the final soft-cap: [M, d] -> float32 [M, V]; for chunks only."""
    # Called as a module, so that ZeRO-3's hooks gather its weight, also when a checkpointed chunk
    # is recomputed.
    raw = network.get_output_embeddings()(final).float()
    cap = soft_cap(network)
    return raw if cap is None else cap * torch.tanh(raw / cap)


def soft_cap(network: Any) -> float | None:
    """The soft-cap of the final logits, if the model has one (Gemma-2)."""
    return getattr(network.config.get_text_config(), "final_logit_softcapping", None)


def chunk_size(network: Any) -> int:
    """Predicting positions per chunk."""
    size = _CHUNK_BYTES_CPU if network.device.type == "cpu" else _CHUNK_BYTES
    return max(1, size // (4 * network.config.get_text_config().vocab_size))
