"""A setting as it is typed in a command line."""

from typing import Any


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def words_of(name: str, value: Any) -> list[str]:
    """The words that set a value; a list repeats its flag."""
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, list) else [value]
    return [word for one in values for word in (flag, str(one))]
