"""Rows with token ids, as TRL's DPO trainer makes them -> TokenPair. Their text is not read."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import BadRow, TokenPair
from fpocli.data.sources import Source

_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def with_token_ids(source: Source) -> Source:
    """The same source, of token ids if its first row has any."""
    with closing(source.rows()) as rows:
        _, row = next(rows, ("", None))
    return replace(source, token_ids=isinstance(row, dict) and set(_COLUMNS) <= row.keys())


def read_token_pairs(source: Source, tokenizer: PairTokenizer) -> Generator[TokenPair]:
    """The pairs of a source, in order; rows that cannot be used are dropped.

    Args:
        source: of rows with token ids.
        tokenizer: its limits apply, and it counts what is dropped. A pair that is too long is
            dropped whole, since what is known of it is known of all its tokens.
    """
    dropped, vocabulary = tokenizer.dropped, len(tokenizer.tokenizer)
    with closing(source.rows()) as rows:
        for number, (place, row) in enumerate(rows):
            dropped.read += 1
            try:
                prompt, chosen, rejected = _ids_of(row, vocabulary)
                pair = TokenPair(prompt, chosen, rejected, number)
                _check(pair, tokenizer)
            except BadRow as bad:
                dropped.add(bad.reason, number, place, bad.detail)
            else:
                yield pair


def _ids_of(row: Any, vocabulary: int) -> Iterator[np.ndarray]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not an object", f"it is {type(row).__name__}")
    for name in _COLUMNS:
        ids = row.get(name)
        if ids is None:
            raise BadRow("missing field", name)
        if not isinstance(ids, list) or not all(
            type(token) is int and 0 <= token < vocabulary for token in ids
        ):
            raise BadRow("wrong type", f"{name} are no token ids of the tokeniser")
        yield np.array(ids, np.int64)


def _check(pair: TokenPair, tokenizer: PairTokenizer) -> None:
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    if not prompt:
        raise BadRow("empty prompt")
    if prompt > tokenizer.max_prompt_length:
        raise BadRow("prompt too long")
    if not chosen or not rejected:
        raise BadRow("empty response")
    if prompt + max(chosen, rejected) > tokenizer.max_length:
        raise BadRow("response too long")
    if np.array_equal(pair.chosen, pair.rejected):
        raise BadRow("equal responses")
