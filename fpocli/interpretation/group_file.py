"""Weights files, written: a named group of features with a comment for each."""

from pathlib import Path
from typing import Any

import yaml

from fpocli.features.weights import GROUP_NAME
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.json_yaml import read_yaml

# Characters of a comment.
_WIDTH = 80


def require_no_group(file: Path, site: str, group: str) -> dict[str, Any]:
    """Refuse a file to which the group cannot be added.

    Returns:
        the file's content; empty if it does not exist.

    Raises:
        UserError: it is not a weights file, or has this group; or the name is no group's.
    """
    if not GROUP_NAME.fullmatch(group):
        raise UserError(
            f"{group!r} is no name of a group", "name it with --group: letters, digits, - and _"
        )
    content = read_yaml(str(file)) if file.exists() else {}
    about = content.get(site, {}) if isinstance(content, dict) else None
    if not isinstance(about, dict) or not isinstance(about.get("groups", {}), dict):
        raise UserError(f"{file} is not a weights file", "choose another --out")
    if group in about.get("groups", {}):
        raise UserError(
            f"{file} has a group {group} already", "remove it, or choose another --group or --out"
        )
    return content


def add_group(file: Path, site: str, group: str, notes: dict[int, str]) -> None:
    """Write a weights file (features/weights.py) with a group, or add the group to one.

    Args:
        file: the file.
        site: the features' site.
        group: its name.
        notes: by feature what it is, for a comment.

    Raises:
        UserError: the file has this group, or was not written by this function.
    """
    # A name such as 12 or yes needs quotes.
    name = yaml.safe_dump(group).splitlines()[0]
    lines = [f"    {name}:", "      weight: 1.0", "      direction: both", "      features:"]
    lines += [
        f"      - {feature}  # {_comment(note)}".rstrip(" #") for feature, note in notes.items()
    ]
    block = "".join(line + "\n" for line in lines)
    content = require_no_group(file, site, group)
    about = {"weight": 1.0, "direction": "both", "features": list(notes)}
    if not file.exists():
        replace_text(file, f"{site}:\n  default: 1.0\n  groups:\n{block}")
        return
    groups = content.get(site, {}).get("groups", {})
    text = file.read_text(encoding="utf-8")
    # Comments and order of the file stay, so the group is added as text where it ends the file.
    longer = text.rstrip("\n") + "\n" + block
    expected = content | {site: content.get(site, {}) | {"groups": groups | {group: about}}}
    if yaml.safe_load(longer) != expected:
        raise UserError(
            f"{file} does not end with the groups of {site}, so no group can be added to it",
            f"choose another --out, and copy the group {group} into the file",
        )
    replace_text(file, longer)


def _comment(note: str) -> str:
    """A text on one line, without characters that YAML forbids."""
    plain = "".join(c if c.isprintable() else " " for c in " ".join(note.split()))
    return plain if len(plain) <= _WIDTH else plain[: _WIDTH - 1] + "…"
