"""Tools in a row: definitions and calls, in the form that chat templates take.

    definition      {"type": "function", "function": {"name", "description", "parameters"}}
    call            {"type": "function", "function": {"name", "arguments": {...}}, "id"}

Other tools write them as JSON text, or without the outer object. Files of tables (Parquet, the hub)
give each object the fields of all others with null in them, so a null is read as absent.
"""

import json
from typing import Any

from fpocli.data.pairs import BadRow

_REASON = "wrong tools"


def definitions(value: Any) -> list[dict[str, Any]]:
    """The tools of a row's column `tools`.

    Raises:
        BadRow: it is no list of tools with a name.
    """
    found = _objects(value, "the column tools")
    return [{"type": "function", "function": _function(tool, "a tool")} for tool in found]


def calls(value: Any) -> list[dict[str, Any]]:
    """The calls of a message, from its tool_calls, function_call or text.

    Raises:
        BadRow: they are no calls with a name and arguments.
    """
    made = []
    for call in _objects(value, "what a message calls"):
        function = _function(call, "a call")
        arguments = _plain(function.get("arguments") or {}, "what a call passes")
        if not isinstance(arguments, dict):
            raise BadRow(_REASON, "what a call passes is no object")
        about = {"type": "function", "function": function | {"arguments": arguments}}
        made.append(about | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return made


def _function(value: dict[str, Any], what: str) -> dict[str, Any]:
    """name and the rest of a tool or a call, which may have an outer object."""
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(_REASON, f"{what} without a name")
    return {name: item for name, item in function.items() if name not in ("type", "id")}


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects, or one alone."""
    value = _plain(value, where)
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BadRow(_REASON, f"{where} is no list of objects")
    return found


def _plain(value: Any, where: str) -> Any:
    """A value that is JSON, or text that holds it, without nulls in objects."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        found = json.loads(text, object_hook=_without_null)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", "half a character, which has no bytes") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(_REASON, f"{where} is no JSON: {error}") from error
    return found


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}
