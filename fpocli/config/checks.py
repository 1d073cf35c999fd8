"""Checks that a config made in Python or from YAML has values that its flags would accept."""

from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fpocli.config.shared import TRACKERS
from fpocli.config.words import flag_of
from fpocli.system.errors import UserError

# What may differ from the store's model with no effect but rounding: the name in --allow, and that
# of the store's attribute.
MAY_DIFFER = {"dtype": "dtype", "kernel": "attention"}
_KNOWN = {"allow": tuple(MAY_DIFFER), "track": TRACKERS}


def check_values(config: Any) -> None:
    """Convert and check every value of a config.

    Raises:
        UserError: a value has the wrong type or is out of range; it names the flag.
    """
    command = type(config).__name__.removesuffix("Config").lower()
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, (kind, *flags) = getattr(config, name), get_args(hint)
        if value is None:
            # The type is KIND | None, or the value is set later.
            if NoneType in get_args(kind) or getattr(type(config), name, ...) is None:
                continue
            raise UserError(f"{flag_of(name)} has no value", "set one, or leave it out")
        if NoneType in get_args(kind):
            kind = get_args(kind)[0]  # of KIND | None
        flag = flag_of(name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UserError(f"{flag} {value} is unknown", f"use {', '.join(get_args(kind))}")
            continue
        if get_origin(kind) is list:
            items = value if isinstance(value, (list, tuple)) else [value]
            value = [_convert(command, flag, item, get_args(kind)[0]) for item in items]
            # What a list may hold is not part of its type, which typer could not read.
            known = _KNOWN.get(name)
            if known and (wrong := [item for item in value if item not in known]):
                raise UserError(f"{flag} {wrong[0]} is unknown", f"use {' or '.join(known)}")
        else:
            value = _convert(command, flag, value, kind)
        object.__setattr__(config, name, value)
        for bound in flags:
            low, high = bound.min, bound.max
            # Written so that nan fails the comparison.
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise UserError(f"{flag} {value} is out of range", _help(command, flag))


def check_device_of_many(device: str | None, launcher: str) -> None:
    """Refuse a single GPU where several processes are started.

    Args:
        device: --device.
        launcher: what gives each process its own.
    """
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"--device {device} is of one process, and {launcher} its own",
            "leave it out, or use --device cpu",
        )


def _help(command: str, flag: str) -> str:
    return f"see `fpo {command} --help` for {flag}"


def _convert(command: str, flag: str, value: Any, kind: type) -> Any:
    """The value converted to its type; YAML reads 2e-5 as text, and 3 where 3.0 is meant."""
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{flag} contains a null character", "write plain text")
    elif isinstance(value, (str, int, float)):
        try:
            converted = kind(value)
        except (ValueError, OverflowError):
            pass
        else:
            # 2.5 is not an integer.
            if kind is not int or isinstance(value, str) or converted == value:
                return converted
    raise UserError(f"{flag} {value} is not of type {kind.__name__}", _help(command, flag))
