"""The result of one check, without anything that its user would not publish."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# A compiler's error can be thousands of lines.
_LONGEST = 600


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: what was checked.
        verdict: `note` is for what limits fpo on this machine but breaks nothing.
        found: what was found, in one line. The home folder and the user's name in paths are
            replaced, since this is pasted into bug reports.
        advice: what to do about it; empty if there is nothing to do.
    """

    name: str
    verdict: Literal["ok", "note", "failed"]
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", _public(self.found))


def _public(text: str) -> str:
    """The text in one line, with ~ for the home folder and `user` for its owner, whose name is
    also in paths such as /tmp/torchinductor_NAME."""
    home = Path("~").expanduser()
    if home.name:
        text = text.replace(str(home), "~")
        text = re.sub(rf"(?<=[/_]){re.escape(home.name)}\b", "user", text)
    return textwrap.shorten(text, _LONGEST, placeholder=" ...")
