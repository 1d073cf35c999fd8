"""Texts of one kind, such as French answers, as the responses of pairs: what fpo features find
reads. So they are scored as responses are in training, after a prompt in the chat template."""

from dataclasses import dataclass, replace
from typing import Any

from fpocli.data.layouts import parse_row
from fpocli.data.pairs import BadRow, Message, Pair
from fpocli.data.sources import open_source
from fpocli.system.errors import UserError

# The prompt of a text that comes without one.
_PROMPT = "Please write a short text."
# Stands in for a second response; it is not looked at.
_NONE = "."


@dataclass(frozen=True)
class TextPair:
    """Two texts as the responses to the same prompt, or one.

    Args:
        pair: the texts, as chosen and rejected.
        texts: how many of the two are texts of the data, 1 or 2.
    """

    pair: Pair
    texts: int


def read_texts(data: str, limit: int) -> list[TextPair]:
    """The texts of a file or data set, two by two.

    A row has `text`, or `prompt` and `response`, or it is a pair in one of the layouts of fpo
    cache, both of whose responses are texts.

    Args:
        data: as `--data` of fpo cache.
        limit: read at most this many texts.

    Raises:
        UserError: the data cannot be read, or a row holds no text.
    """
    waiting: dict[str, Pair] = {}
    found: list[tuple[Pair, int]] = []
    count = 0
    for place, row in open_source(data, None, None).rows():
        if count >= limit:
            break
        pair = _pair(row, place)
        if pair.rejected != _NONE:
            found.append((pair, 2))
            count += 2
            continue
        count += 1
        # A text with the same prompt becomes the second response.
        other = waiting.pop(str(pair.prompt), None)
        if other is None:
            waiting[str(pair.prompt)] = pair
        elif other.chosen == pair.chosen:
            # A pair of equal responses would be dropped.
            found += [(other, 1), (pair, 1)]
        else:
            found.append((replace(other, rejected=pair.chosen), 2))
    found += [(pair, 1) for pair in waiting.values()]
    if not found:
        raise UserError(f"{data} holds no text", 'write {"text": "..."}, one per line')
    return [TextPair(replace(pair, row=i), texts) for i, (pair, texts) in enumerate(found)]


def _pair(row: Any, place: str) -> Pair:
    """The texts of a row."""
    try:
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, dict) and "chosen" not in row:
            text = row.get("text", row.get("response"))
            prompt = row.get("prompt", _PROMPT)
            if not isinstance(text, str) or not text.strip():
                raise BadRow("no text", f"its fields are {', '.join(map(str, row)) or 'none'}")
            if not isinstance(prompt, str) or not prompt.strip():
                raise BadRow("empty prompt")
            messages: list[Message] = [{"role": "user", "content": prompt}]
            return Pair(messages, text, _NONE, -1, place)
        return parse_row(row, -1, place)
    except BadRow as bad:
        detail = f", {bad.detail}" if bad.detail else ""
        raise UserError(
            f"{place}: {bad.reason}{detail}",
            'a row is {"text": ...}, {"prompt": ..., "response": ...} or a preference pair',
        ) from bad
