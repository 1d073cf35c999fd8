"""Flags that set the defaults of others: --config from a YAML file, --preset from the paper."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fpocli.config import PRESETS
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_yaml


def _read_yaml(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the flags' defaults, so that flags override them and both are
    checked in the same way."""
    if path is not None:
        try:
            values = read_yaml(path) or {}
        except OSError as error:
            raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from error
        except UserError as error:
            raise typer.BadParameter(str(error)) from error
        if not isinstance(values, dict):
            raise typer.BadParameter(f"{path} must hold one flag per line, name: value")
        names = {str(name).replace("-", "_"): value for name, value in values.items()}
        # The file may be somebody else's.
        if names.pop("trust_remote_code", False):
            raise typer.BadParameter(
                f"{path} sets trust_remote_code, which is allowed on the command line only: remove "
                "it from the file and add --trust-remote-code if you trust the code"
            )
        flags = {flag.name: flag for flag in context.command.params if flag.name != "config"}
        if unknown := sorted(names.keys() - flags.keys()):
            raise typer.BadParameter(f"{path} sets {', '.join(unknown)}, which is not a flag")
        for name, value in names.items():
            several = getattr(flags[name], "multiple", False)
            if isinstance(value, dict) or (isinstance(value, list) and not several):
                raise typer.BadParameter(f"{path} sets '--{name}' to more than one value")
            if several and not isinstance(value, list):
                names[name] = [value]
        _add_defaults(context, names, win=True)
    return path


def _apply_preset(context: typer.Context, name: str | None) -> str | None:
    if name is not None:
        if name not in PRESETS:
            raise typer.BadParameter(f"{name} is not one of {', '.join(PRESETS)}")
        _add_defaults(context, PRESETS[name], win=False)
    return name


def _add_defaults(context: typer.Context, values: dict[str, Any], *, win: bool) -> None:
    held = dict(context.default_map or {})
    context.default_map = held | values if win else values | held


CONFIG = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with any of these flags; the command line overrides it.",
        callback=_read_yaml,
        is_eager=True,
    ),
]
PRESET = Annotated[
    str | None,
    typer.Option(
        help=f"The paper's settings: {', '.join(PRESETS)}. --config and flags override them.",
        autocompletion=lambda incomplete: [name for name in PRESETS if name.startswith(incomplete)],
        callback=_apply_preset,
        is_eager=True,
    ),
]
