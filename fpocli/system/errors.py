"""Errors that a user can cause: a sentence and a hint, printed by the command line, exit code 2."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# errno of a write for which there is no space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How the Rust libraries report it, in errors other than OSError.
_UNWRITTEN = "(os error "
# Most characters of a message; some libraries quote a whole file.
_LONGEST = 1000


class UserError(Exception):
    """A mistake of the user, or a condition outside the program, in one sentence.

    The sentence may quote files of other people. It is limited to a readable length and to
    printable characters, so that nothing in it can control a terminal.

    Args:
        message: what is wrong, naming the file, flag or value.
        hint: what to do about it; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # Both are passed to Exception, so that the error can be pickled.
        super().__init__(message, hint)
        self.message = _readable(message)
        self.hint = _readable(hint)

    def __str__(self) -> str:
        return self.message


def _readable(text: str) -> str:
    line = " ".join(text[:_LONGEST].split()) + "..." * (len(text) > _LONGEST)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Report a file that safetensors or tokenizers cannot write.

    Raises:
        UserError: there was no space, or another error of the operating system.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or _UNWRITTEN not in str(error):
            raise
        raise UserError(
            f"{path} cannot be written: {error}", "free some space and run the same command again"
        ) from error


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """Where two nested settings differ: "limits.max_length is 512 there, 2048 here"."""
    found = []
    for name in there.keys() | here.keys():
        one, other = there.get(name), here.get(name)
        if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            one, other = ({str(i): v for i, v in enumerate(part)} for part in (one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            found.append(differences(one, other, f"{prefix}{name}."))
        elif one != other:
            found.append(f"{prefix}{name} is {one!s:.60} there, {other!s:.60} here")
    return "; ".join(sorted(filter(None, found)))
