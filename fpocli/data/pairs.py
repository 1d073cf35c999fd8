"""A preference pair, as text and as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The two responses of a pair, in the order of columns.
SIDES = ("chosen", "rejected")
# role and content; an assistant's may have tool_calls, a tool's the name of the tool and the call.
Message = dict[str, Any]
TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Args:
        prompt: the conversation up to the answer, as chat messages.
        chosen: the preferred answer; a message if an answer of the pair calls tools.
        rejected: the other answer.
        row: its row in the source, from 0.
        place: where to find it, such as "pairs.jsonl, line 3".
        layout: of the row, as docs/data.md names it.
        tools: the definitions of the tools that the prompt offers.
    """

    prompt: list[Message]
    chosen: str | Message
    rejected: str | Message
    row: int
    place: str = field(default="", compare=False)
    layout: str = field(default="", compare=False)
    tools: list[dict[str, Any]] = field(default_factory=list)


class BadRow(Exception):
    """A row of the data that is not a usable pair.

    Args:
        reason: one of the reasons in docs/data.md.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TokenPair:
    """The token ids of a pair; none of the three parts is empty.

    Args:
        prompt, chosen, rejected: token ids.
        row: the pair's row in the source, or -1.
        source: which one of a mixture, from 0.
    """

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    row: int = -1
    source: int = 0

    def __len__(self) -> int:
        """Tokens of the pair, the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)
