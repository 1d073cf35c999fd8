"""The tokens around the place where a feature is largest.

Shapes: n scored tokens of a response, w tokens of a window.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fpocli.data.pairs import SIDES, TokenPair
from fpocli.features.encoder import SparseEncoder
from fpocli.interpretation.activations import token_activations
from fpocli.model.language_model import LanguageModel

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


def find_contexts(
    model: LanguageModel,
    encoder: SparseEncoder,
    tokenizer: Any,
    pair_of: Callable[[int], TokenPair],
    wanted: Mapping[int, Sequence[int]],
    packed_length: int | None = None,
) -> dict[int, list[dict[str, Any]]]:
    """The contexts of features in chosen responses; the model is run over their pairs.

    Args:
        model: a model whose only site is the encoder's.
        encoder: the SAE.
        tokenizer: of the model.
        pair_of: a pair by its number i.
        wanted: by feature the responses, 2i for the chosen and 2i + 1 for the rejected of pair i.
        packed_length: the most tokens of a packed sequence; None is the device's default.

    Returns:
        by feature a `context` for each of its responses.
    """
    numbers = sorted({response // 2 for responses in wanted.values() for response in responses})
    pairs = {number: pair_of(number) for number in numbers}
    values = token_activations(model, encoder, list(pairs.values()), list(wanted), packed_length)
    by_pair = dict(zip(pairs, values, strict=True))
    return {
        feature: [
            context(tokenizer, pairs[number], side, by_pair[number][side][:, column])
            for number, side in (divmod(response, 2) for response in responses)
        ]
        for column, (feature, responses) in enumerate(wanted.items())
    }


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
        "side": SIDES[side],
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
