"""Token runs -> packed rows, the only input of a model here.

Shapes: R rows, L slots per row, P pairs, M scored tokens (all responses of the batch together).

A row holds whole pairs. Inside a pair the prompt stands once, then the chosen and the rejected
response; both attend to the prompt and not to each other, and both take up the positions right
after it. Today a row holds one pair; only this file knows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fpocli.tokens import TokenPair

PROMPT, CHOSEN, REJECTED = 0, 1, 2
_PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Rows of packed pairs.

    Args:
        ids: [R, L] token ids.
        positions: [R, L] position of each token in its own sequence (prompt, response).
        pair: [R, L] which pair of the row a slot belongs to, -1 for padding.
        run: [R, L] PROMPT, CHOSEN or REJECTED.
        predictors: [M] slots, as indices into the R x L grid, whose output predicts a target:
            the last prompt slot up to the last but one of the response (method.md).
        targets: [M] the response tokens, grouped by response: chosen and rejected of the first
            pair, then of the next.
        counts: 2P numbers of scored tokens n(y), in the order of `targets`.
    """

    ids: Tensor
    positions: Tensor
    pair: Tensor
    run: Tensor
    predictors: Tensor
    targets: Tensor
    counts: list[int]

    def attends(self, window: int | None = None) -> Tensor:
        """The attention rule: which slot (query) sees which slot (key).

        A key is seen by slots of the same pair at the same or a later position, if it is a prompt
        token or in the query's own run. With a sliding window the two are less than `window`
        positions apart, however far apart their slots are.

        Returns:
            bool [R, L, L], query by key. A padding slot sees itself, so no query sees nothing.
        """
        query, key = self.pair[:, :, None], self.pair[:, None, :]
        run_query, run_key = self.run[:, :, None], self.run[:, None, :]
        distance = self.positions[:, :, None] - self.positions[:, None, :]
        allowed = (query == key) & (query != _PADDING) & (distance >= 0)
        allowed &= (run_key == PROMPT) | (run_key == run_query)
        if window is not None:
            allowed &= distance < window
        return allowed | torch.eye(
            self.ids.shape[1], dtype=torch.bool, device=self.ids.device
        ).unsqueeze(0)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if name != "counts"
        }
        return replace(self, **moved)


def group(lengths: np.ndarray, slots: int) -> Iterator[list[int]]:
    """Pairs in groups that each make one batch, alike in length, so that little is padding.

    Args:
        lengths: tokens of each pair, the prompt once.
        slots: how many slots a batch may have; a longer pair is a group of its own.
    """
    members: list[int] = []
    for pair in np.argsort(-lengths, kind="stable").tolist():
        if members and lengths[members[0]] * (len(members) + 1) > slots:
            yield members
            members = []
        members.append(pair)
    yield members


def pack(pairs: Sequence[TokenPair]) -> Batch:
    """Lay pairs out in rows.

    Args:
        pairs: P pairs; the order of the responses in the batch is theirs.
    """
    rows = [[pair] for pair in pairs]
    length = max(sum(len(pair) for pair in row) for row in rows)
    shape = (len(rows), length)
    ids, positions, run = (np.zeros(shape, np.int64) for _ in range(3))
    owner = np.full(shape, _PADDING, np.int64)
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for r, row in enumerate(rows):
        start = 0
        for p, pair in enumerate(row):
            last_prompt = start + len(pair.prompt) - 1
            for kind, tokens in enumerate((pair.prompt, pair.chosen, pair.rejected)):
                slots = slice(start, start + len(tokens))
                first = 0 if kind == PROMPT else len(pair.prompt)
                ids[r, slots] = tokens
                positions[r, slots] = np.arange(first, first + len(tokens))
                owner[r, slots] = p
                run[r, slots] = kind
                if kind != PROMPT:
                    inside = np.arange(start, start + len(tokens) - 1)
                    predictors.append(r * length + np.append(last_prompt, inside))
                    targets.append(np.asarray(tokens, np.int64))
                start += len(tokens)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        pair=torch.from_numpy(owner),
        run=torch.from_numpy(run),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        counts=[len(tokens) for tokens in targets],
    )
