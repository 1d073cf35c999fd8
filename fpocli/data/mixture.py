"""Several sources as one: which pair comes from which, in an order that is the same every time."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from fpocli.data.layouts import read_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import TokenPair
from fpocli.data.sources import Source
from fpocli.data.token_rows import read_token_pairs

T = TypeVar("T")


def token_pairs(sources: list[Source], tokenizer: PairTokenizer) -> Iterator[TokenPair]:
    """The pairs of all sources that can be scored; the tokeniser counts the rows that cannot.

    If a source has a weight, the pairs up to any point are in proportion to the weights, as nearly
    as whole pairs can be, and the first source without a next pair is the end. Otherwise all pairs
    are used, and those of each source are spread evenly over the whole.
    """
    known: set[bytes] = set()

    def stream(number: int, source: Source) -> Iterator[TokenPair]:
        pairs = (
            read_token_pairs(source, tokenizer)
            if source.token_ids
            else tokenizer(read_pairs(source, tokenizer.dropped, known))
        )
        for pair in pairs:
            # Arrays take a tenth of the memory of lists.
            prompt, chosen, rejected = (
                np.asarray(ids, np.uint32) for ids in (pair.prompt, pair.chosen, pair.rejected)
            )
            yield TokenPair(prompt, chosen, rejected, pair.row, number)

    streams = [stream(number, source) for number, source in enumerate(sources)]
    if len(streams) == 1:
        yield from streams[0]
    elif weights := integer_weights(sources):
        yield from mixed(streams, weights)
    else:
        read = [list(one) for one in streams]
        there = [one for one in read if one]
        yield from mixed(there, [len(one) for one in there])


def integer_weights(sources: list[Source]) -> list[int]:
    """The weights of sources as integers in the same proportion, so that no rounding decides an
    order; empty if no source has one."""
    if not any(source.weight for source in sources):
        return []
    ratios = [(source.weight or 1.0).as_integer_ratio() for source in sources]
    below = math.lcm(*(under for _, under in ratios))
    return [above * below // under for above, under in ratios]


def mixed(streams: Sequence[Iterable[T]], weights: list[int]) -> Iterator[T]:
    """The pairs of several streams in proportion to their weights, up to the first end of one.

    The i-th pair of a stream of weight w has the place (i - 1/2) / w; of equal places the earlier
    stream's comes first (Webster's method of apportionment).
    """
    whole = math.lcm(*weights)
    steps = [2 * whole // weight for weight in weights]
    iterators = [iter(stream) for stream in streams]
    places = [(step // 2, number) for number, step in enumerate(steps)]
    heapq.heapify(places)
    while places:
        place, number = places[0]
        if (pair := next(iterators[number], None)) is None:
            return
        yield pair
        heapq.heapreplace(places, (place + steps[number], number))
