"""JSON and YAML files of other people, read as data: whatever is in them, it is that or a sentence.

PyYAML and json raise more than their own errors: at a date that does not exist, a number of 5,000
digits, or brackets nested too deep.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from fpocli.system.errors import UserError

# Values of a YAML file: weights for every feature of a dozen sites.
_MOST = 2_000_000


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", "mend the file") from error


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds: plain values only, never an object of Python's.

    Raises:
        UserError: it is no YAML.
    """
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (
        yaml.YAMLError, ValueError, RecursionError, ArithmeticError, LookupError, AttributeError,
        TypeError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as YAML: {error}", "mend the file") from error
    if _is_endless(value):
        raise UserError(
            f"{path} stands for more than {_MOST:,} values, by references to itself",
            "mend the file",
        )
    return value


def _is_endless(value: Any) -> bool:
    """Whether references multiply what a short YAML file holds beyond use."""
    waiting, seen = [value], 0
    while waiting and seen <= _MOST:
        seen += 1
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            waiting += item.values() if isinstance(item, dict) else item
    return seen > _MOST


def is_file_name(name: Any) -> bool:
    """Whether it names something right inside a folder, and not a way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
