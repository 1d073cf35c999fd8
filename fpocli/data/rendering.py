"""Conversations in a tokeniser's chat template. Text of the data that spells a special token stays
text: it is marked before the template runs, and split off afterwards."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from fpocli.data.pairs import Message

Tools = list[dict[str, Any]]


def render(
    tokenizer: Any, messages: list[Message], tools: Tools, answers: Sequence[Message] = ()
) -> list[list[str]]:
    """A conversation with its generation prompt, and each answer with its end of turn: what the
    template writes of it after the prompt.

    Returns:
        Each text in parts; every second one is text of the data that spells a special token.

    Raises:
        ValueError: it writes the prompt otherwise when an answer follows.
    """
    mark, split = _marks(tokenizer, [messages, tools, *answers])
    talk, offered = mark(messages), mark(tools)
    prompt = _apply(tokenizer, talk, offered, asks=True)
    written = [_apply(tokenizer, [*talk, mark(answer)], offered) for answer in answers]
    if not all(whole.startswith(prompt) for whole in written):
        raise ValueError("with an answer, it writes the prompt otherwise than without")
    return [split(prompt), *(split(whole.removeprefix(prompt).rstrip()) for whole in written)]


def left_out(
    tokenizer: Any, messages: list[Message], tools: Tools, known: dict[tuple[Any, ...], bool]
) -> str:
    """What of the tools in a conversation the template silently leaves out, or "".

    Args:
        tokenizer: transformers', with a chat template.
        messages: the conversation with its answer.
        tools: the definitions.
        known: what was found out about the template before; more is added.
    """
    for what, is_last, fewer, fewer_tools in _without_each(messages, tools):
        key = what, is_last, messages[0]["role"]
        if key not in known:
            whole = _apply(tokenizer, messages, tools)
            try:
                known[key] = whole != _apply(tokenizer, fewer, fewer_tools)
            except Exception:  # it needs the piece, so it does not leave it out
                known[key] = True
        if not known[key]:
            return what
    return ""


def _without_each(
    messages: list[Message], tools: Tools
) -> Iterator[tuple[str, bool, list[Message], Tools]]:
    """The name of each piece, whether it is of the answer, and the conversation without it."""
    if tools:
        yield "the tools", False, messages, []
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1

        def change(
            what: str, i: int = i, is_last: bool = is_last, **changes: Any
        ) -> tuple[str, bool, list[Message], Tools]:
            changed = {k: v for k, v in (messages[i] | changes).items() if v is not None}
            return what, is_last, [*messages[:i], changed, *messages[i + 1 :]], tools

        if "tool_calls" in message:
            yield change("the calls of tools", tool_calls=None)
            if len(message["tool_calls"]) > 1:
                yield change("calls after the first", tool_calls=message["tool_calls"][:1])
        if message["content"].strip() and "tool_calls" in message:
            yield change("the text beside a call", content="")
        elif message["content"].strip() and message["role"] == "tool":
            yield change("the results of tools", content="")


def _apply(tokenizer: Any, messages: list[Message], tools: Tools, *, asks: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, tokenize=False, add_generation_prompt=asks
    )


def _marks(
    tokenizer: Any, data: list[Any]
) -> tuple[Callable[[Any], Any], Callable[[str], list[str]]]:
    """How to mark what spells a special token in these data, and to split a rendering there."""
    spelt = _special_pattern(tokenizer)
    texts = list(_texts(data))
    if not any(spelt.search(text) for text in texts):
        return lambda value: value, lambda text: [text]
    # Two rare ideographs that do not occur in them. A template that writes lists or objects as
    # Python does would write characters that are not printable, such as private ones, as escapes.
    used = {character for text in texts for character in text}
    free = (chr(code) for code in range(0x20000, 0x2A6D0) if chr(code) not in used)
    left, right = next(free), next(free)
    marked = re.compile(f"{left}({spelt.pattern}){right}?")

    def mark(value: Any) -> Any:
        return _changed(value, lambda text: spelt.sub(rf"{left}\g<0>{right}", text))

    def split(text: str) -> list[str]:
        # A template that cuts the data at a special token, such as the end of a thought, leaves a
        # single mark.
        return [re.sub(f"[{left}{right}]", "", part) for part in marked.split(text)]

    return mark, split


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of special tokens; matches nothing if there are none."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    longest_first = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages or tools, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Messages or tools with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_changed(name, change): _changed(item, change) for name, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value
