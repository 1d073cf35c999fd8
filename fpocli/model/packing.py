"""Token runs -> packed rows, the only input of a model here.

Shapes: L slots of a row, P pairs, M scored tokens (all responses of the row together).

A row holds whole pairs, one after the other. Inside a pair the prompt stands once, then the chosen
and the rejected response. Both take up the positions right after the prompt, and positions start
over with every pair. Who attends to whom is in attention.py.
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
    """A packed row: what a model scores at once.

    Args:
        ids: [L] token ids.
        positions: [L] position of each token in its own sequence (prompt, response).
        predictors: [M] slots whose output predicts a target: the last prompt slot up to the last
            but one of the response (method.md).
        targets: [M] the response tokens, grouped by response: chosen and rejected of the first
            pair, then of the next.
        spans: int64 [P, 4], slots where the pair's prompt, chosen and rejected response start, and
            its end, as in a store. It stays on the CPU.
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
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "spans"}
        return replace(self, **moved)


def pack(pairs: Sequence[TokenPair], multiple: int = 1) -> PackedSequence:
    """Lay pairs out in one row.

    Args:
        pairs: P pairs; the order of the responses in the batch is theirs.
        multiple: the row's length is rounded up to a multiple of it, with slots of no pair.
    """
    runs = [run for pair in pairs for run in (pair.prompt, pair.chosen, pair.rejected)]
    lengths = np.array([len(run) for run in runs])
    ends = lengths.cumsum().reshape(-1, 3)
    spans = np.column_stack([np.concatenate([[0], ends[:-1, 2]]), ends])
    size = int(ends[-1, 2])
    ids, positions = np.zeros((2, size + -size % multiple), np.int64)
    np.concatenate(runs, out=ids[:size])
    slots = np.arange(size)
    start, chosen, rejected, _ = spans.T
    # The slot of position 0, as seen from each run; the rejected one is moved onto the chosen one.
    origins = np.column_stack([start, start, start + rejected - chosen])
    positions[:size] = slots - origins.ravel().repeat(lengths)
    scored = np.tile([False, True, True], len(pairs)).repeat(lengths)
    predictors = slots[scored] - 1
    # The first token of either response is predicted by the last one of the prompt.
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
    """The row budget where none is given: enough work at once to keep the device busy, little
    enough for its memory."""
    return 8192 if device.type == "cuda" else 2048


def plan_packing(lengths: Sequence[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Which pairs share a row.

    Args:
        lengths: tokens of each pair, the prompt once.
        budget: the most tokens of a row; a longer pair has a row of its own.
        ranks: the number of rows is a multiple of it, and several ranks get rows alike in length;
            with fewer pairs than ranks some rows are empty.

    Returns:
        rows of indices into `lengths`, the longest row first.
    """
    rows = _best_fit(lengths, budget)
    if ranks == 1:
        return rows
    count = -(-len(rows) // ranks) * ranks
    while True:
        spread, longest = _spread(lengths, count)
        if longest <= max(budget, *lengths):
            return spread
        if count == len(rows):
            return rows
        count += ranks


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each pair goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free slots, row), sorted
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        place = bisect_left(room, (lengths[pair], 0))
        if place == len(room):
            rows.append([])
            free, row = budget, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append(pair)
        insort(room, (free - lengths[pair], row))
    return sorted(rows, key=lambda row: -sum(lengths[pair] for pair in row))


def _spread(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Longest first, each into the shortest of `count` rows; the rows and the longest's tokens."""
    shortest = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        tokens, row = heapq.heappop(shortest)
        rows[row].append(pair)
        heapq.heappush(shortest, (tokens + lengths[pair], row))
    totals = {row: tokens for tokens, row in shortest}
    order = sorted(range(count), key=lambda row: -totals[row])
    return [rows[row] for row in order], max(totals.values())
