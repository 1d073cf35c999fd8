"""Preference data in its usual layouts -> Pair.

Layouts, told apart row by row:
    text            prompt, chosen, rejected are strings
    messages        prompt is a list of messages; chosen, rejected are the assistant's messages
    UltraFeedback   chosen, rejected are whole conversations, with or without a prompt column
    HH-RLHF         chosen, rejected are transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..."
"""

import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from fpocli.data.dropped import DroppedRows
from fpocli.data.pairs import BadRow, Message, Pair
from fpocli.data.sources import Source

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def parse_row(row: Any, number: int, place: str) -> Pair:
    if not isinstance(row, dict):
        raise BadRow("no object", f"it is {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadRow("missing field", name)
        if row[name] is None:
            raise BadRow("null field", name)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong type", "chosen is text and rejected is not, or the other way round")
    if isinstance(chosen, str) and prompt is not None:
        head = [_message("user", prompt)] if isinstance(prompt, str) else _messages(prompt)
        answers = [_message("assistant", text) for text in (chosen, rejected)]
        return _pair(head, answers, number, place)
    if isinstance(chosen, str):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    else:
        chosen, rejected = _messages(chosen), _messages(rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        prompt = [_message("user", prompt)]
    if isinstance(prompt, list):
        head = _messages(prompt)
        chosen, rejected = _without(head, chosen), _without(head, rejected)
    else:
        # The conversations share all turns but the last.
        head = chosen[:-1]
        if rejected[:-1] != head:
            raise BadRow("different prompts", "turns before the last differ")
        chosen, rejected = chosen[-1:], rejected[-1:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise BadRow("not one answer", "each side must end in one answer after the prompt")
    return _pair(head, [chosen[0], rejected[0]], number, place)


def _pair(head: list[Message], answers: list[Message], number: int, place: str) -> Pair:
    if any(answer["role"] != "assistant" for answer in answers):
        raise BadRow("wrong role", "an answer must be an assistant message")
    if not any(message["content"].strip() for message in head):
        raise BadRow("empty prompt")
    chosen, rejected = (answer["content"] for answer in answers)
    if not chosen.strip() or not rejected.strip():
        raise BadRow("empty response", "" if chosen.strip() else "chosen")
    return Pair(head, chosen, rejected, number, place)


def _without(head: list[Message], conversation: list[Message]) -> list[Message]:
    return conversation[len(head) :] if conversation[: len(head)] == head else conversation


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("wrong type", "a message's role and content must be text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("half a character", "a lone surrogate") from error
    return {"role": role, "content": content}


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow("wrong type", "messages must be a list")
    if not value:
        raise BadRow("empty messages")
    for item in value:
        if not isinstance(item, dict):
            raise BadRow("wrong type", "a message must be an object with role and content")
        for name in ("role", "content"):
            if name not in item:
                raise BadRow("missing field", f"{name} of a message")
    return [_message(item["role"], item["content"]) for item in value]


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's transcript as messages."""
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        raise BadRow("missing field", "prompt; and the text is no Human/Assistant transcript")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_message(_ROLE[speaker], content) for speaker, content in turns]


def read_pairs(source: Source, drops: DroppedRows) -> Iterator[Pair]:
    """The pairs of a source, in order; rows that are none go to `drops`."""
    with closing(source.rows) as rows:
        for number, (place, row) in enumerate(rows):
            drops.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                pair = parse_row(row, number, place)
            except BadRow as bad:
                drops.add(bad.reason, number, place, bad.detail)
            else:
                yield pair
