"""The tokens around the place where a feature is largest.

Shapes: n scored tokens of a response, w tokens of a window.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fpocli.data.pairs import TokenPair

# Tokens before one that may change its text.
_DEPENDENT = 8
# Tokens shown before the largest activation and after it.
_BEFORE, _AFTER = 16, 8


def read_tokens(pair: TokenPair, side: int) -> list[int]:
    """The tokens at whose positions a response is scored: the last one of the prompt, and the
    response without its last: [n] ids.

    Args:
        pair: the pair.
        side: 0 is chosen, 1 rejected.
    """
    response = (pair.chosen, pair.rejected)[side]
    return [int(pair.prompt[-1]), *(int(token) for token in response[:-1])]


def context(tokenizer: Any, pair: TokenPair, side: int, activations: np.ndarray) -> dict[str, Any]:
    """The window around the largest activation of a response.

    Args:
        tokenizer: of the model.
        pair: the pair.
        side: 0 is chosen, 1 rejected.
        activations: float32 [n], of one feature.

    Returns:
        `side`; `peak`, the largest activation; `tokens`, the texts of w tokens, `activations`,
        theirs, and `at`, which of them is the largest.
    """
    at = int(np.argmax(activations))
    begin = max(0, at - _BEFORE)
    window = slice(begin, at + _AFTER + 1)
    return {
        "side": ("chosen", "rejected")[side],
        "peak": float(activations[at]),
        "tokens": pieces(tokenizer, read_tokens(pair, side)[window]),
        "activations": [float(value) for value in activations[window]],
        "at": at - begin,
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that the pieces together are the text of all. A character of
    several tokens is in the piece of its last."""
    found: list[str] = []
    done = 0  # tokens whose text is in `found`
    for end in range(1, len(ids) + 1):
        # What a token adds to the text depends on the few before it.
        window = max(0, done - _DEPENDENT)
        before, whole = (
            tokenizer.decode(list(ids[window:stop]), clean_up_tokenization_spaces=False)
            for stop in (done, end)
        )
        # The replacement character stands for bytes that are not a character yet.
        if whole.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(whole[len(before) :])
        done = end
    return found
