"""The attention rule of packed sequences, and the two kernels that implement it.

The rule: a token attends to the tokens of its own pair, at its own or an earlier position, that
belong to the prompt or to its own response. In a layer with a sliding window the two positions are
less than `window` apart. Positions are those in the sequence (prompt, response), not places in the
packed sequence.

Shapes: L tokens of the packed sequence, H heads, h width of a head, l tokens of one sequence
(prompt and one response), q queries.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpocli.model.packing import PackedSequence
from fpocli.system.errors import UserError

# The hint for a model that cannot be used.
SUPPORTED = "docs/families.md lists the model families that were checked"
# Our own, registered with transformers: dense attention, one sequence at a time.
BY_SEQUENCE = "fpo_by_sequence"
FLEX = "flex_attention"
# Packed sequences for flex_attention are a multiple of its block, so that no block is partial.
FLEX_BLOCK = 128


def choose_kernel(device: torch.device) -> str:
    """The attention kernel for a device. Both implement the rule, sliding windows and soft-capping.

    On a GPU it is torch's flex_attention, whose block masks skip what the rule forbids. It has no
    backward pass on a CPU; there each sequence is computed separately, by dense matrix products.
    """
    return FLEX if device.type == "cuda" else BY_SEQUENCE


def length_multiple(device: torch.device) -> int:
    """The multiple that the length of a packed sequence is rounded up to on a device."""
    return FLEX_BLOCK if choose_kernel(device) == FLEX else 1


def layer_types(config: Any) -> set[str]:
    """The types of a model's attention layers: full_attention, sliding_attention, ..."""
    window = getattr(config, "sliding_window", None)
    only = "sliding_attention" if window else "full_attention"
    return set(getattr(config, "layer_types", None) or [only])


def check_attention(network: Any) -> None:
    """Refuse a model whose attention cannot follow the rule.

    Raises:
        UserError: it names the type of layer, or the attention implementation in use.
    """
    config = network.config.get_text_config()
    if other := layer_types(config) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{type(network).__name__} has layers of type {', '.join(sorted(other))}, which cannot "
            "follow the attention rule of packed sequences",
            SUPPORTED,
        )
    if config._attn_implementation not in (BY_SEQUENCE, FLEX):
        raise UserError(
            f"{type(network).__name__} runs its {config._attn_implementation} attention, which "
            "does not follow the attention rule of packed sequences",
            SUPPORTED,
        )


def attention_rule(batch: PackedSequence, window: int | None = None) -> Callable[..., Tensor]:
    """The rule as flex_attention's mask function of (batch, head, query, key).

    A padding token attends to itself alone, so that no query has an empty set of keys.
    """
    size = len(batch.ids)
    owner, start = np.full(size, -1), np.zeros(size, np.int64)
    for number, span in enumerate(batch.spans):
        owner[span[0] : span[3]] = number
        # Besides the prompt, a token attends to its pair from here on.
        start[span[0] : span[1]] = span[0]
        start[span[1] : span[2]] = span[1]
        start[span[2] : span[3]] = span[2]
    prompt_end = np.where(owner < 0, 0, batch.spans[owner, 1])
    pair, first, end = (
        torch.from_numpy(array).to(batch.ids.device) for array in (owner, start, prompt_end)
    )
    positions = batch.positions

    def allowed(_: Any, __: Any, query: Tensor, key: Tensor) -> Tensor:
        seen = (pair[query] == pair[key]) & (pair[query] >= 0) & (key <= query)
        seen = seen & ((key < end[query]) | (key >= first[query]))
        if window is not None:
            seen = seen & (positions[query] - positions[key] < window)
        return seen | (query == key)

    return allowed


def attention_mask(
    batch: PackedSequence, window: int | None, kernel: str, dtype: torch.dtype
) -> Any:
    """The attention mask of a layer type.

    Args:
        batch: the packed sequence.
        window: sliding window of this type of layer, or None.
        kernel: BY_SEQUENCE or FLEX.
        dtype: of the model.

    Returns:
        FLEX: a BlockMask of the rule.
        BY_SEQUENCE: what is added to the scores of the longest sequence, [1, 1, l, l]. Inside a
            sequence the rule is plain causal attention, so shorter ones use a part of it.
    """
    device = batch.ids.device
    if kernel == FLEX:
        size = len(batch.ids)
        return _block_mask_maker()(
            attention_rule(batch, window), None, None, size, size, device=device
        )
    longest = int(batch.positions.max()) + 1
    visible = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
    if window is not None:
        visible.triu_(1 - window)
    band = torch.zeros(longest, longest, dtype=dtype, device=device)
    return band.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


@cache
def _block_mask_maker() -> Callable[..., Any]:
    """create_block_mask; compiled, it never materialises the mask [L, L]."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def attend_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    spans: np.ndarray,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, one sequence at a time; transformers calls it in every layer.

    The prompt is computed with the chosen response, and the rejected response uses its keys and
    values. So nothing of one pair enters the arithmetic of another.

    Args:
        module: the attention layer.
        query: [1, H, L, h].
        key, value: [1, key heads, L, h].
        attention_mask: [1, 1, l, l] from the function `attention_mask`.
        scaling: factor of the scores.
        spans: of the packed sequence.
        softcap: limits the scores to +- softcap, as in Gemma-2.

    Returns:
        [1, L, H, h], and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    band = attention_mask[0, 0]
    outputs = []
    for start, chosen, rejected, end in spans.tolist():
        first, own = slice(start, rejected), slice(rejected, end)
        prompt = chosen - start
        outputs.append(
            _attend(query[first], key[first], value[first], band, 0, groups, scaling, softcap)
        )
        outputs.append(
            _attend(
                query[own],
                torch.cat([key[start:chosen], key[own]]),
                torch.cat([value[start:chosen], value[own]]),
                band,
                prompt,
                groups,
                scaling,
                softcap,
            )
        )
    return torch.cat(outputs)[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band: Tensor,
    first: int,
    groups: int,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Dense attention of one sequence's last q tokens: [q, H, h].

    Matrix products and a softmax. On a CPU this takes less than half the time of torch's fused
    kernel (benchmarks/results), and it supports soft-capping.

    Args:
        query: [q, H, h], of the tokens from position `first` on.
        key, value: [l, key heads, h].
        band: [>= l, >= l].
        first: position of the first query.
        groups: query heads per key head.
        scaling, softcap: as above.
    """
    visible = band[first : len(key), : len(key)]
    heads, keys, values = query.transpose(0, 1), key.permute(1, 2, 0), value.transpose(0, 1)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    if softcap is None:
        scores = torch.baddbmm(visible, heads, keys, alpha=scaling)
    else:
        scores = softcap * torch.tanh(torch.bmm(heads, keys) * (scaling / softcap)) + visible
    return torch.bmm(scores.softmax(-1), values).transpose(0, 1)


def register_kernel() -> None:
    """Register BY_SEQUENCE with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
