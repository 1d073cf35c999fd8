"""A preference pair, as text and as token ids, and the rows of a source read as pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Message = dict[str, str]
TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Args:
        prompt: the conversation up to the answer, as chat messages.
        chosen: the preferred answer.
        rejected: the other answer.
        row: its row in the source, from 0.
        place: where people find it, such as "pairs.jsonl, line 3".
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    row: int
    place: str = field(default="", compare=False)


class BadRow(Exception):
    """A row that is no pair.

    Args:
        reason: the kind of mistake, as docs/data.md lists them.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TokenPair:
    """The three token runs of a pair, none of them empty.

    Args:
        prompt, chosen, rejected: token ids.
        row: the pair's row in the source; -1 where it has none.
    """

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    row: int = -1

    def __len__(self) -> int:
        """Tokens of the pair, the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)
