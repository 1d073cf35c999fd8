"""JSON and YAML files from elsewhere, read as data: any content is a value or a UserError.

PyYAML and json raise more than their own errors: for a date that does not exist, a number of 5,000
digits, or brackets nested too deeply.
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from fpocli.system.errors import UserError

# Most values of a YAML file: weights for every feature of a dozen sites.
_MOST = 2_000_000


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", "correct the file") from error


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file; see `parse_yaml`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}", "correct the file") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: str | Path) -> Any:
    """The value of a YAML text, made of plain values only, never of Python objects.

    Args:
        text: the YAML.
        path: where it is from, for errors.

    Raises:
        UserError: it is not valid YAML.
    """
    try:
        value = yaml.safe_load(text)
    except (
        yaml.YAMLError, ValueError, RecursionError, ArithmeticError, LookupError, AttributeError,
        TypeError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is not valid YAML: {error}", "correct the file") from error
    if _is_endless(value):
        raise UserError(
            f"{path} expands to more than {_MOST:,} values by references to itself",
            "write the values out",
        )
    return value


def _is_endless(value: Any) -> bool:
    """Whether references expand a short YAML file without bound."""
    waiting, seen = [value], 0
    while waiting and seen <= _MOST:
        seen += 1
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            waiting += item.values() if isinstance(item, dict) else item
    return seen > _MOST


def json_number(value: float) -> float | None:
    """A number for JSON, which has neither infinity nor NaN: None stands for them."""
    return float(value) if math.isfinite(value) else None


def is_finite_number(value: Any) -> bool:
    """Whether it is a finite number of JSON or YAML; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_file_name(name: Any) -> bool:
    """Whether it is the name of a file directly inside a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
