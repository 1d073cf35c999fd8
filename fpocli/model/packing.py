"""Pairs of token ids -> packed sequences, the only input of a model in fpo.

A packed sequence holds whole pairs, one after the other: the prompt once, then the chosen and the
rejected response. The positions of both responses continue those of the prompt, and positions start
at 0 with every pair. Which token attends to which is in attention.py.

Shapes: L tokens of the packed sequence, P pairs, M scored tokens (all responses together).
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fpocli.data.pairs import TokenPair


@dataclass(frozen=True)
class PackedSequence:
    """What a model scores in one forward pass.

    Args:
        ids: [L] token ids.
        positions: [L] position of each token in its own sequence (prompt, response).
        predictors: [M] indices of the tokens whose output predicts a target: from the last token of
            the prompt to the last but one of the response (docs/method.md).
        targets: [M] the response tokens, grouped by response: chosen and rejected of the first
            pair, then of the next.
        spans: int64 [P, 4], where the pair's prompt, chosen and rejected response start, and where
            the pair ends, as in a store. It stays on the CPU.
    """

    ids: Tensor
    positions: Tensor
    predictors: Tensor
    targets: Tensor
    spans: np.ndarray

    @property
    def counts(self) -> list[int]:
        """n(y) of the 2P responses, in the order of `targets`."""
        return np.diff(self.spans[:, 1:]).ravel().tolist()

    def to(self, device: torch.device) -> Self:
        """The same packed sequence on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "spans"}
        return replace(self, **moved)


def pack(pairs: Sequence[TokenPair], multiple: int = 1) -> PackedSequence:
    """Pack pairs into one sequence.

    Args:
        pairs: P pairs, whose order is kept.
        multiple: the length is rounded up to a multiple of it with padding, which belongs to no
            pair.
    """
    runs = [run for pair in pairs for run in (pair.prompt, pair.chosen, pair.rejected)]
    lengths = np.array([len(run) for run in runs])
    ends = lengths.cumsum().reshape(-1, 3)
    spans = np.column_stack([np.concatenate([[0], ends[:-1, 2]]), ends])
    size = int(ends[-1, 2])
    ids, positions = np.zeros((2, size + -size % multiple), np.int64)
    np.concatenate(runs, out=ids[:size])
    places = np.arange(size)
    start, chosen, rejected, _ = spans.T
    # Where position 0 of each part would be; the rejected response is shifted onto the chosen.
    origins = np.column_stack([start, start, start + rejected - chosen])
    positions[:size] = places - origins.ravel().repeat(lengths)
    scored = np.tile([False, True, True], len(pairs)).repeat(lengths)
    predictors = places[scored] - 1
    # The first token of each response is predicted by the last token of the prompt.
    counts = np.diff(spans[:, 1:])
    predictors[counts.cumsum().reshape(-1, 2)[:, 0]] = chosen - 1
    return PackedSequence(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        predictors=torch.from_numpy(predictors),
        targets=torch.from_numpy(ids[:size][scored]),
        spans=spans,
    )


def default_packed_length(device: torch.device) -> int:
    """Tokens of a packed sequence unless --packed-length says otherwise: enough to keep the device
    busy, few enough for its memory."""
    return 8192 if device.type == "cuda" else 2048


def plan_packing(lengths: Sequence[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Decide which pairs share a packed sequence.

    Args:
        lengths: tokens of each pair, the prompt once.
        budget: the most tokens of a packed sequence; a longer pair has one to itself.
        ranks: the number of packed sequences is a multiple of it, and with several ranks their
            lengths are balanced; with fewer pairs than ranks some are empty.

    Returns:
        for each packed sequence, the longest first, the indices of its pairs in `lengths`.
    """
    packed = _best_fit(lengths, budget)
    if ranks == 1:
        return packed
    count = -(-len(packed) // ranks) * ranks
    while True:
        spread, longest = _spread(lengths, count)
        if longest <= max(budget, *lengths):
            return spread
        if count == len(packed):
            return packed
        count += ranks


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each pair goes where it leaves the least room."""
    packed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, packed sequence), sorted
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        place = bisect_left(room, (lengths[pair], 0))
        if place == len(room):
            packed.append([])
            free, number = budget, len(packed) - 1
        else:
            free, number = room.pop(place)
        packed[number].append(pair)
        insort(room, (free - lengths[pair], number))
    return sorted(packed, key=lambda pairs: -sum(lengths[pair] for pair in pairs))


def _spread(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Longest pair first, each into the shortest of `count` packed sequences.

    Returns:
        the packed sequences, and the tokens of the longest.
    """
    shortest = [(0, number) for number in range(count)]
    packed: list[list[int]] = [[] for _ in range(count)]
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        tokens, number = heapq.heappop(shortest)
        packed[number].append(pair)
        heapq.heappush(shortest, (tokens + lengths[pair], number))
    totals = {number: tokens for tokens, number in shortest}
    order = sorted(range(count), key=lambda number: -totals[number])
    return [packed[number] for number in order], max(totals.values())
