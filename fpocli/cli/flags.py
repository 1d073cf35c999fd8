"""The fields of a config -> the flags of its command, in groups."""

import dataclasses
import inspect
from copy import copy
from typing import Annotated, Any, get_args

from typer.core import TyperCommand


def flags_of(config: type) -> dict[str, tuple[Any, Any]]:
    """The type and default of each flag, as typer takes them, by the name of its field."""
    return {
        field.name: (_grouped(config, field), _default(field))
        for field in dataclasses.fields(config)
    }


def _grouped(config: type, field: dataclasses.Field) -> Any:
    """The type and flag of a field, in the group of --help that its class is."""
    owner = next(one for one in config.__mro__ if field.name in inspect.get_annotations(one))
    kind, flag = get_args(field.type)
    flag = copy(flag)
    flag.rich_help_panel = getattr(owner, "HEADING", None)
    return Annotated[kind, flag]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


class GroupedCommand(TyperCommand):
    """A command whose --help lists its flags in the groups of its config."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups, in the order of their first flags."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                heading = (
                    "Arguments"
                    if is_argument
                    else getattr(parameter, "rich_help_panel", None) or "Options"
                )
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)
