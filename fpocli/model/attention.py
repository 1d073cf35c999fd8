"""Attention by the rule of packed rows, and the kernels that keep it.

The rule: a slot sees the slots of its own pair, at its own or an earlier position, that belong to
the prompt or to its own response. In a layer with a sliding window, the two are less than `window`
positions apart, however far apart their slots are.

Shapes: L slots, H heads, h width of a head, l tokens of a sequence (prompt and one response),
q queries.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpocli.model.packing import PackedSequence
from fpocli.system.errors import UserError

# Ours, registered with transformers: dense attention of each sequence apart.
BY_SEQUENCE = "fpo_by_sequence"
FLEX = "flex_attention"
# Rows for flex_attention are a multiple of its block, so that no block is cut.
FLEX_BLOCK = 128


def choose_kernel(device: torch.device) -> str:
    """The kernel for a device. Both know the rule, sliding windows and attention soft-capping.

    On a GPU it is torch's flex_attention, whose block masks skip what the rule forbids. It has no
    backward pass on a CPU; there every sequence is attended to apart, by dense matrix products.
    """
    return FLEX if device.type == "cuda" else BY_SEQUENCE


def length_multiple(device: torch.device) -> int:
    """What the length of a row on a device is rounded up to."""
    return FLEX_BLOCK if choose_kernel(device) == FLEX else 1


def layer_kinds(config: Any) -> set[str]:
    """The kinds of attention layers of a model: full_attention, sliding_attention."""
    window = getattr(config, "sliding_window", None)
    only = "sliding_attention" if window else "full_attention"
    return set(getattr(config, "layer_types", None) or [only])


def check_kernel(network: Any) -> None:
    """Refuse a model or kernel that would silently drop the rule or the model's soft-capping.

    Raises:
        UserError: its sentence names the kernel, or the kind of layer.
    """
    config = network.config.get_text_config()
    if other := layer_kinds(config) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{type(network).__name__} has layers of the kind {', '.join(sorted(other))}, which "
            "cannot follow the attention rule of packed rows",
            "Gemma-2, Gemma-3 and Llama models are supported",
        )
    if config._attn_implementation not in (BY_SEQUENCE, FLEX):
        raise UserError(
            f"the attention kernel {config._attn_implementation} would drop the attention rule of "
            "packed rows or the model's soft-capping",
            "let fpo choose the kernel",
        )


def rule(batch: PackedSequence, window: int | None = None) -> Callable[..., Tensor]:
    """The rule as flex_attention's mask function of (batch, head, query slot, key slot).

    A slot of no pair sees itself alone, so that no query sees nothing.
    """
    size = len(batch.ids)
    owner, start = np.full(size, -1), np.zeros(size, np.int64)
    for number, span in enumerate(batch.spans):
        owner[span[0] : span[3]] = number
        # What a slot sees of its pair besides the prompt starts here.
        start[span[0] : span[1]] = span[0]
        start[span[1] : span[2]] = span[1]
        start[span[2] : span[3]] = span[2]
    prompt_end = np.where(owner < 0, 0, batch.spans[owner, 1])
    pair, run, end = (
        torch.from_numpy(array).to(batch.ids.device) for array in (owner, start, prompt_end)
    )
    positions = batch.positions

    def allowed(_: Any, __: Any, query: Tensor, key: Tensor) -> Tensor:
        seen = (pair[query] == pair[key]) & (pair[query] >= 0) & (key <= query)
        seen = seen & ((key < end[query]) | (key >= run[query]))
        if window is not None:
            seen = seen & (positions[query] - positions[key] < window)
        return seen | (query == key)

    return allowed


def mask(batch: PackedSequence, window: int | None, kernel: str, dtype: torch.dtype) -> Any:
    """What a layer's kernel is given, as its attention mask.

    Args:
        batch: the row.
        window: of the layer's kind, or None.
        kernel: BY_SEQUENCE or FLEX.
        dtype: of the model.

    Returns:
        FLEX: a BlockMask of the rule.
        BY_SEQUENCE: what is added to the scores of a sequence, [1, 1, l, l] for the longest one.
            Inside a sequence the rule is plain causal attention, so this one serves them all.
    """
    device = batch.ids.device
    if kernel == FLEX:
        size = len(batch.ids)
        return _block_mask_maker()(rule(batch, window), None, None, size, size, device=device)
    longest = int(batch.positions.max()) + 1
    visible = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
    if window is not None:
        visible.triu_(1 - window)
    band = torch.zeros(longest, longest, dtype=dtype, device=device)
    return band.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


@cache
def _block_mask_maker() -> Callable[..., Any]:
    """create_block_mask; compiled, it never holds the mask of all slots by all slots."""
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
    """Attention of a row, sequence by sequence; transformers calls it in every layer.

    The prompt is attended to with the chosen response; the rejected one looks back at its keys.
    Nothing of one pair enters the arithmetic of another, and no score is made that the rule
    forbids across responses.

    Args:
        module: the attention layer.
        query: [1, H, L, h].
        key, value: [1, key heads, L, h].
        attention_mask: from `mask`.
        scaling: of the scores.
        spans: of the batch.
        softcap: caps the scores at +- softcap, as Gemma-2 does.

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

    Matrix products and a softmax that sums in float32, all through torch. On a CPU this takes
    less than half of the time of torch's fused kernel (benchmarks/results), and it can cap scores.

    Args:
        query: [q, H, h], of the tokens `first` and after.
        key, value: [l, key heads, h].
        band: [>= l, >= l].
        first: position of the first query.
        groups: heads that share a key.
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


def register_kernels() -> None:
    """Make BY_SEQUENCE known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
