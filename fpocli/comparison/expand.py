"""An entry of a grid's `runs`, with lists of alternatives -> the settings of every run."""

import dataclasses
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from fpocli.config import CacheConfig, TrainConfig
from fpocli.system.errors import UserError

# Settings that describe one site together, so their alternatives are not multiplied.
_OF_A_SITE = ("layer", "site", "sae")


def expand_entry(entry: Any, own: dict[str, set[str]], path: str) -> list[dict[str, Any]]:
    """All combinations of an entry of `runs`, in which a list stands for alternatives. Those of
    layer, site and sae belong together and are taken in turn.

    Args:
        entry: of `runs`.
        own: settings that fpo compare sets itself, by section.
        path: the grid's file.

    Raises:
        UserError: a setting is unknown, or layer, site and sae have different numbers.
    """
    if not isinstance(entry, dict):
        raise UserError(
            f"an entry of `runs` in {path} is not a mapping of settings", "write {method: fpo}"
        )
    known = field_names(TrainConfig) | field_names(CacheConfig)
    check_names(entry, known - own["train"] - own["cache"], f"`runs` in {path}")
    several = {name for config in (CacheConfig, TrainConfig) for name in _lists(config)}
    choices: list[list[dict[str, Any]]] = []
    zipped: dict[str, list[Any]] = {}
    for name, value in entry.items():
        # For a setting that is a list, the alternatives are a list of lists.
        of_lists = isinstance(value, list) and any(isinstance(item, list) for item in value)
        listed = of_lists if name in several else isinstance(value, list)
        if listed and name in _OF_A_SITE:
            zipped[name] = value
        else:
            choices.append([{name: item} for item in (value if listed else [value])])
    if len({len(values) for values in zipped.values()}) > 1:
        raise UserError(
            f"{', '.join(zipped)} in `runs` of {path} have different numbers of alternatives",
            "they describe one site together, so name as many of each",
        )
    if zipped:
        rows = zip(*zipped.values(), strict=True)
        choices.append([dict(zip(zipped, row, strict=True)) for row in rows])
    return [
        {name: value for part in parts for name, value in part.items()}
        for parts in product(*choices)
    ]


def check_names(content: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse settings that no command accepts.

    Raises:
        UserError: it names them.
    """
    if unknown := sorted(str(name) for name in content if name not in known):
        raise UserError(
            f"{where} sets {', '.join(unknown)}, which is unknown or set by fpo compare itself",
            "see fpo --help",
        )


def field_names(config: type) -> set[str]:
    """The settings of a command."""
    return {field.name for field in dataclasses.fields(config)}


def _lists(config: type) -> set[str]:
    hints = get_type_hints(config, include_extras=True)
    return {name for name, hint in hints.items() if get_origin(get_args(hint)[0]) is list}


def name_of(choice: dict[str, Any]) -> str:
    """A run's name, such as method-fpo_at-layer_0.resid_post+layer_25.resid_post_seed-1."""

    def text(value: Any) -> str:
        parts = value if isinstance(value, list) else [value]
        return "+".join(str(part).strip("/").replace("/", "-") for part in parts)

    return "_".join(f"{name}-{text(value)}" for name, value in choice.items())
