"""Rows of preference data, in the usual layouts -> Pair.

Layouts, recognised row by row:
    text            prompt, chosen, rejected are strings
    messages        prompt is a list of messages; chosen, rejected are the assistant's messages
    UltraFeedback   chosen, rejected are whole conversations, with or without a prompt column
    HH-RLHF         chosen, rejected are transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..."

conversions.py first makes rows of these of other tools' layouts.
"""

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import closing
from typing import Any

from fpocli.data.conversions import convert
from fpocli.data.dropped import DroppedRows
from fpocli.data.pairs import SIDES, BadRow, Message, Pair
from fpocli.data.sources import Source
from fpocli.data.tools import calls, definitions

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def read_pairs(
    source: Source, dropped: DroppedRows, known: set[bytes] | None = None
) -> Generator[Pair]:
    """The pairs of a source, in order; rows that cannot be used go to `dropped`.

    Args:
        source: of the rows.
        dropped: where those that cannot be used are counted.
        known: hashes of the pairs of other sources; those of this one are added.
    """
    known = set() if known is None else known
    with closing(source.rows()) as rows:
        for number, (place, row) in enumerate(rows):
            dropped.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                pair = parse_row(row, number, place, source.score_margin)
                if source.deduplicate:
                    _require_new(pair, known)
            except BadRow as bad:
                detail, hint = bad.detail, ""
                # The row that an error may name.
                if isinstance(row, dict) and (dropped.strict or not dropped.counts):
                    detail = "; ".join(filter(None, [detail, f"it has {describe_row(row)}"]))
                    hint = nearest_layout(row)
                dropped.add(bad.reason, number, place, detail, hint)
            else:
                yield pair


def _require_new(pair: Pair, known: set[bytes]) -> None:
    """Note a pair by the hash of its texts.

    Raises:
        BadRow: an equal one is known.
    """
    texts = json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.tools], sort_keys=True)
    digest = hashlib.sha256(texts.encode()).digest()[:16]
    if digest in known:
        raise BadRow("duplicate")
    known.add(digest)


def require_a_pair(sources: list[Source], strict: bool) -> None:
    """Read each source of text up to its first pair, before anything expensive is done for it.

    Raises:
        UserError: no row of one is a pair; or, with `strict`, an earlier row is not one.
    """
    for source in sources:
        if source.token_ids:
            continue
        dropped = DroppedRows(strict)
        with closing(read_pairs(source, dropped)) as pairs:
            if next(pairs, None) is None:
                raise dropped.nothing_left()


def parse_row(row: Any, number: int, place: str, score_margin: float = 0.0) -> Pair:
    """The pair in a row.

    Args:
        row: as it was read.
        number: of the row in its source.
        place: where to find it.
        score_margin: of scored answers, by how much the best must exceed the worst.

    Raises:
        BadRow: there is none, or it cannot be used.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"it is {type(row).__name__}")
    tools = definitions(row["tools"]) if row.get("tools") else []
    row, layout = convert(row, score_margin)
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
        kind = "text" if isinstance(prompt, str) else "messages"
        return _pair(head, answers, tools, number, place, layout or kind)
    kind = "messages"
    if isinstance(chosen, str):
        chosen, rejected, kind = _transcript(chosen), _transcript(rejected), "HH-RLHF"
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
        kind = kind if kind == "HH-RLHF" else "two conversations"
    if len(chosen) != 1 or len(rejected) != 1:
        raise BadRow("not one answer", "each side must end in one answer after the prompt")
    return _pair(head, [chosen[0], rejected[0]], tools, number, place, layout or kind)


def _pair(
    head: list[Message],
    answers: list[Message],
    tools: list[dict[str, Any]],
    number: int,
    place: str,
    layout: str,
) -> Pair:
    if any(answer["role"] != "assistant" for answer in answers):
        raise BadRow("wrong role", "an answer must be an assistant message")
    if not any(message["content"].strip() for message in head):
        raise BadRow("empty prompt")
    for side, answer in zip(SIDES, answers, strict=True):
        if not answer["content"].strip() and "tool_calls" not in answer:
            raise BadRow("empty response", side)
    # A template may write more of an answer than its text; so both are rendered, or neither.
    rendered = any("tool_calls" in answer for answer in answers)
    chosen, rejected = answers if rendered else (answer["content"] for answer in answers)
    return Pair(head, chosen, rejected, number, place, layout, tools)


def _without(head: list[Message], conversation: list[Message]) -> list[Message]:
    return conversation[len(head) :] if conversation[: len(head)] == head else conversation


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("wrong type", "a message's role and content must be text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", "half a character, which has no bytes") from error
    return {"role": role, "content": content}


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow("wrong type", "messages must be a list")
    if not value:
        raise BadRow("empty messages")
    made = []
    for item in value:
        if not isinstance(item, dict):
            raise BadRow("wrong type", "a message must be an object with role and content")
        if "role" not in item:
            raise BadRow("missing field", "role of a message")
        made.append(_with_tools(item))
    return made


def _with_tools(item: dict[str, Any]) -> Message:
    """A message, with what it has of tools."""
    found = item.get("tool_calls") or item.get("function_call")
    if "content" not in item and not found:
        raise BadRow("missing field", "content of a message")
    content = item.get("content")
    message = _message(item["role"], "" if content is None and found else content)
    if found:
        message["tool_calls"] = calls(found)
    if message["role"] in ("tool", "function"):
        # OpenAI's name of the role before tools were called so.
        message["role"] = "tool"
        named = {name: item.get(name) for name in ("name", "tool_call_id")}
        message |= {name: text for name, text in named.items() if isinstance(text, str)}
    return message


def _transcript(text: str) -> list[Message]:
    """A transcript of HH-RLHF as messages."""
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        raise BadRow("missing field", "prompt; and the text is no Human/Assistant transcript")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_message(_ROLE[speaker], content) for speaker, content in turns]


# -- what an error says of a row ----------------------------------------------------------------


def describe_row(row: dict[str, Any]) -> str:
    """The columns of a row and their types, such as "chosen: text, prompt: list of messages"."""
    return ", ".join(f"{name}: {_kind(value)}" for name, value in row.items()) or "no columns"


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"object with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    names = {str: "text", bool: "true or false", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def nearest_layout(row: dict[str, Any]) -> str:
    """How to turn a row of another well-known layout into one that fpo reads."""
    columns = row.keys()
    texts = "write prompt, chosen and rejected as text"
    if "output" in columns and "instruction" in columns:
        return (
            "this looks like Alpaca with one answer; fpo needs two: chosen and rejected, or a list "
            "output with the better one first"
        )
    if {"messages"} & columns or "conversations" in columns:
        return (
            "this is one conversation; the nearest layout is implicit prompt: two conversations, "
            "chosen and rejected, that differ in their last message"
        )
    if not {"chosen", "rejected"} <= columns:
        return f"the nearest layout is text: {texts} (docs/data.md has all layouts)"
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        return (
            "the nearest layout is messages: each message is an object with role and content, both "
            "text (docs/data.md)"
        )
    return f"the nearest layout is text: {texts} (docs/data.md)"
