"""Rows as other tools write them -> rows with prompt, chosen and rejected, which layouts.py reads.

    ShareGPT        conversations of {from, value}; chosen and rejected are one such message each
    Alpaca          instruction and input; chosen and rejected, or output with the better one first
    scored answers  UltraFeedback's completions or Argilla's generations and ratings: the answer
                    with the best score against the one with the worst
    other names     question, instruction or input for the prompt; a column system

What is not recognised is returned as it is.
"""

from typing import Any

from fpocli.data.pairs import SIDES, BadRow
from fpocli.system.json_yaml import is_finite_number

_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "system": "system",
    # Calls of tools, as JSON text, and what they return.
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "tool": "tool", "function": "tool", "tool_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")
# The first of these that a row has is its question.
_QUESTIONS = ("prompt", "instruction", "question", "input")
_ANSWERS, _RATINGS = ("generations", "responses"), ("ratings", "rating", "scores")
_SCORES = ("overall_score", "fine-grained_score", "score", "rating")
_MEDIA = ("images", "videos", "audios")
_TEXTS = ("response", "text", "content")


def convert(row: dict[str, Any], score_margin: float) -> tuple[dict[str, Any], str]:
    """The row with prompt, chosen and rejected, and the name of its layout; the row as it is, and
    "", if it is of none of these.

    Args:
        row: as it was read.
        score_margin: of scored answers, by how much the best must exceed the worst.

    Raises:
        BadRow: it is of a layout that holds no pair, or its scores give none.
    """
    is_kto = {"completion", "label"} <= row.keys() or "kto_tag" in row
    if is_kto and "chosen" not in row:
        raise BadRow("one answer", "an answer and a label, as for KTO; a pair has two answers")
    if media := [name for name in _MEDIA if row.get(name)]:
        raise BadRow("media", f"a column {media[0]}")
    made, layout = dict(row), "Alpaca" if "instruction" in row and "prompt" not in row else ""
    if "chosen" not in row and "rejected" not in row:
        made |= _two_answers(row, score_margin)
        if "chosen" in made and "output" not in row:
            layout = "scored answers"
    if made.keys() & {"chosen", "rejected"}:
        made |= _prompt(made)
    for name in ("prompt", "chosen", "rejected"):
        if name in made:
            before, made[name] = made[name], _messages(made[name])
            if isinstance(before, list | dict) and "from" in _keys(before):
                layout = "ShareGPT"
    return made, layout


def _two_answers(row: dict[str, Any], score_margin: float) -> dict[str, Any]:
    """chosen and rejected of answers in a list; nothing if there is none."""
    output = row.get("output")
    if isinstance(output, list) and len(output) == 2 and "instruction" in row:
        return {"chosen": output[0], "rejected": output[1]}
    if (scored := _scored(row)) is None:
        return {}
    known = [(score, answer) for score, answer in scored if is_finite_number(score)]
    if len(known) < 2:
        raise BadRow("too few scores", f"{len(known)} of {len(scored)} answers have one")
    # Of several equal ones the first.
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise BadRow("equal scores", f"all are {best[0]:g}")
    if best[0] - worst[0] < score_margin:
        raise BadRow("scores too close", f"{best[0]:g} and {worst[0]:g}")
    return {"chosen": best[1], "rejected": worst[1]}


def _scored(row: dict[str, Any]) -> list[tuple[Any, Any]] | None:
    """Every answer of a row with its score; None if it holds no scored answers."""
    completions = row.get("completions")
    if isinstance(completions, list) and all(isinstance(one, dict) for one in completions):
        name = next((n for n in _SCORES if any(n in one for one in completions)), None)
        text = next((n for n in _TEXTS if any(n in one for one in completions)), None)
        return [(one.get(name), one.get(text)) for one in completions] if name and text else None
    answers, ratings = _first(row, _ANSWERS), _first(row, _RATINGS)
    if not isinstance(answers, list) or not isinstance(ratings, list):
        return None
    if len(answers) != len(ratings):
        raise BadRow("too few scores", f"{len(ratings)} ratings of {len(answers)} answers")
    return list(zip(ratings, answers, strict=True))


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    """prompt, if the row has it under another name, or in parts; with a column system also the
    sides, if they are whole conversations."""
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _first(row, ("conversations", "messages"))
        # A side may be the whole conversation.
        if not isinstance(prompt, list) or _is_talk(row.get("chosen")):
            prompt = None
        elif prompt and _ROLES.get(str(_role(prompt[-1]))) == "assistant":
            raise BadRow("not one answer", "the conversation before chosen ends with an answer")
    if prompt is None:
        prompt = _first(row, _QUESTIONS)
        more = row.get("input")
        if "instruction" in row and isinstance(prompt, str) and isinstance(more, str) and more:
            prompt = f"{prompt}\n{more}"
    if (history := row.get("history")) and "instruction" in row and isinstance(prompt, str):
        prompt = [*_turns(history), {"role": "user", "content": prompt}]
    found = {} if prompt is None else {"prompt": prompt}
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return found
    sides = {side: row[side] for side in SIDES if _is_talk(row.get(side))}
    if isinstance(prompt, str) and not sides:
        found = {"prompt": [{"role": "user", "content": prompt}]}
    return found | {
        name: _with_system(talk, system)
        for name, talk in (found | sides).items()
        if isinstance(talk, list)
    }


def _with_system(talk: list[Any], system: str) -> list[Any]:
    """A conversation that begins with a system message: its own, or this one."""
    own = bool(talk) and _role(talk[0]) == "system"
    return talk if own else [{"role": "system", "content": system}, *talk]


def _turns(history: Any) -> list[dict[str, Any]]:
    """Alpaca's earlier turns, each a question and an answer."""
    if not isinstance(history, list):
        raise BadRow("wrong type", "history must be a list of questions and answers")
    turns: list[dict[str, Any]] = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("wrong type", "history must be a list of questions and answers")
        roles = zip(("user", "assistant"), turn, strict=True)
        turns += [{"role": role, "content": text} for role, text in roles]
    return turns


def _messages(value: Any) -> Any:
    """Messages with role and content; a single one as a list of one."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(item) if isinstance(item, dict) else item for item in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if "role" in message or "from" not in message:
        return message
    role = message["from"]
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow("unknown speaker", f"a message from {role}")
    if role in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": message.get("value")}
    return {"role": _ROLES[role], "content": message.get("value")}


def _keys(value: list[Any] | dict[str, Any]) -> Any:
    """Those of a message, or of the first of several."""
    first = value[0] if isinstance(value, list) and value else value
    return first.keys() if isinstance(first, dict) else ()


def _is_talk(side: Any) -> bool:
    """Whether a side is a conversation of several messages."""
    return isinstance(side, list) and len(side) > 1


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
