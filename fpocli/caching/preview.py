"""fpo cache --dry-run: the first pairs as the model will see them. No model is loaded."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from fpocli.config import CacheConfig
from fpocli.data.dropped import DroppedRows
from fpocli.data.layouts import read_pairs
from fpocli.data.mixture import integer_weights, mixed
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import Pair, TokenIds, TokenPair
from fpocli.data.sources import Source, sources_of
from fpocli.data.token_rows import with_token_ids
from fpocli.display.terminal import show_preview
from fpocli.system.console import data_console, progress
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model

# Rows that are read, and pairs that are shown.
_ROWS, _SHOWN = 1000, 3


def preview(config: CacheConfig) -> dict[str, Any]:
    """Read and tokenise the first rows, print what was found, and return it.

    Args:
        config: the settings; those of data and tokeniser are used.

    Returns:
        `read`, `kept`, `dropped` by reason, `layouts` by name, `template`, and `pairs`: the first
        ones, each with its row, place, layout and parts; a part has its tokens, whether they are
        scored and truncated, and pieces of text that are special tokens or not.

    Raises:
        UserError: the data or the tokeniser cannot be used, or no pair is left.
    """
    limit = min(config.limit or _ROWS, _ROWS)
    sources = sources_of(replace(config, limit=limit))
    if config.reference_logps and with_token_ids(sources[0]).token_ids:
        raise UserError(
            f"the rows of {config.data[0]} have token ids already, which are stored as they are",
            "leave out --dry-run",
        )
    folder = find_model(config.model, weights=False, trust_remote_code=config.trust_remote_code)
    dropped = DroppedRows(config.strict)
    tokenizer = PairTokenizer(
        folder, config.chat_template, config.max_length, config.max_prompt_length, dropped
    )
    layouts: Counter[str] = Counter()
    counts: list[int] = []
    known: set[bytes] = set()
    first: list[tuple[Pair, TokenPair]] = []
    # Of a mixture, pairs of every source.
    most = max(1, _SHOWN // len(sources))
    with progress("Tokenising pairs", limit * len(sources)) as bar:
        for source in sources:
            places: dict[int, Pair] = {}
            counts.append(0)
            tokenised = tokenizer(_noted(read_pairs(source, dropped, known), layouts, places))
            for number, tokens in enumerate(tokenised):
                counts[-1] += 1
                bar.advance()
                if number < most:
                    first.append((places[tokens.row], tokens))
    if not any(counts):
        raise dropped.nothing_left()
    end = tokenizer.end_of_turn
    shown = {
        "read": dropped.read,
        "kept": _stored(sources, counts),
        "dropped": dict(dropped.counts),
        "layouts": dict(layouts),
        "template": tokenizer.template_name,
        "pairs": [
            {
                "row": tokens.row,
                "place": pair.place,
                "layout": pair.layout,
                "parts": {
                    name: _part(tokenizer.tokenizer, ids, end, scored=name != "prompt")
                    for name, ids in (
                        ("prompt", tokens.prompt),
                        ("chosen", tokens.chosen),
                        ("rejected", tokens.rejected),
                    )
                },
            }
            for pair, tokens in first
        ],
    }
    show_preview(shown, data_console())
    return shown


def _stored(sources: list[Source], counts: list[int]) -> int:
    """How many of so many pairs of each source are stored: all, or what the weights leave."""
    weights = integer_weights(sources) if len(sources) > 1 else []
    streams = [range(count) for count in counts]
    return sum(1 for _ in mixed(streams, weights)) if weights else sum(counts)


def _noted(pairs: Iterable[Pair], layouts: Counter[str], places: dict[int, Pair]) -> Iterator[Pair]:
    """The pairs; meanwhile their layouts are counted, and each is kept by its row."""
    for pair in pairs:
        layouts[pair.layout] += 1
        places[pair.row] = pair
        yield pair


def _part(tokenizer: Any, ids: TokenIds, end: list[int], *, scored: bool) -> dict[str, Any]:
    """A part of a pair: runs of special and of other tokens, as text."""
    ids = list(ids)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {
        "tokens": len(ids),
        "scored": scored,
        # A template may end a call with another special token.
        "truncated": scored and ids[-len(end) :] != end and ids[-1] not in special,
        "pieces": [
            {"text": tokenizer.decode(list(run)), "special": is_special}
            for is_special, run in groupby(ids, special.__contains__)
        ],
    }
