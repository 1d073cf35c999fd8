"""What a user can cause. The command line prints it as a sentence with a hint and exits with 2."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the system says of a write for which there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch and the Rust libraries say instead, in errors that are no OSError.
_UNWRITTEN = ("inline_container", "(os error ")
# Characters of a message; some libraries put a whole file into theirs.
_LONGEST = 1000


class UserError(Exception):
    """A mistake or a condition outside the program, told in one sentence.

    The sentence may quote files of other people. It is cut to a readable length and to characters
    that can be shown, so that none of them reaches a terminal as a command.

    Args:
        message: what is wrong, naming the file, flag or value.
        hint: what to do about it; empty when nothing sensible can be advised.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # Both go to Exception, so that the error can be sent between processes.
        super().__init__(message, hint)
        self.message = _readable(message)
        self.hint = _readable(hint)

    def __str__(self) -> str:
        return self.message


def _readable(text: str) -> str:
    line = " ".join(text[:_LONGEST].split()) + "..." * (len(text) > _LONGEST)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell of a file that torch, safetensors or tokenizers cannot write.

    Raises:
        UserError: there was no room for it, or another reason of the system's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not any(part in str(error) for part in _UNWRITTEN):
            raise
        raise UserError(
            f"{path} cannot be written: {error}", "free some space and give the same command again"
        ) from error


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """Where two nested settings differ, in words: "limits.max_length is 512 there, 2048 here"."""
    found = []
    for name in there.keys() | here.keys():
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found.append(differences(one, other, f"{prefix}{name}."))
        elif one != other:
            found.append(f"{prefix}{name} is {one!s:.60} there, {other!s:.60} here")
    return "; ".join(sorted(filter(None, found)))
