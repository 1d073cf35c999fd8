"""Where a store is: a folder, or a prefix of a bucket (bucket.py).

A key is the path of a file inside of it, such as spans/c/0/0.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fpocli.system.errors import UserError
from fpocli.system.files import is_empty, remove_folder, replace_text

T = TypeVar("T")


class Place(Protocol):
    """What a store needs of the place where it is.

    Files appear complete or not at all.

    Raises:
        UserError: of every method, if the place cannot be reached.
    """

    # How often something is read that does not match its checksum, before it counts as damaged.
    attempts: int

    @property
    def name(self) -> Path | str:
        """As it was typed."""

    def exists(self, key: str = "") -> bool:
        """Whether there is a file, or, with "", anything."""

    def is_empty(self) -> bool:
        """Whether nothing is there, or a folder with only what a crash left of its first file."""

    def read(self, key: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none.
        """

    def write(self, key: str, content: bytes) -> None:
        """Write or replace a file."""

    def delete(self, key: str) -> None:
        """Delete a file, if there is one."""

    def files(self, prefix: str = "") -> Iterator[str]:
        """The keys of all files whose key begins with a prefix that ends in a slash, or is ""."""

    def clear(self) -> None:
        """Delete everything, the root's metadata last or all at once."""

    def clear_partial(self) -> None:
        """Delete what crashes left of files that were being written. Nobody may write meanwhile."""

    def leads_out(self, key: str) -> bool:
        """Whether a file or folder is a link to something elsewhere."""

    def read_beside(self, suffix: str) -> str:
        """The text of the file whose name is the store's and a suffix; "" if there is none."""

    def write_beside(self, suffix: str, text: str) -> None:
        """Write that file; with "" delete it."""

    def beside(self, suffix: str) -> str:
        """The name of that file."""

    def free_bytes(self) -> int | None:
        """How much can still be written; None if there is no limit."""

    def for_zarr(self) -> Any:
        """What zarr opens."""

    def together(self, reads: Sequence[Callable[[], T]]) -> list[T]:
        """What several reads return, in their order; at once, where each waits for an answer."""


def place_of(name: str | Path | Place) -> Place:
    """The place that a path or URL names.

    Raises:
        UserError: the URL is of no kind that fpo knows, or its packages are not installed.
    """
    if isinstance(name, Path):
        return Folder(name)
    if not isinstance(name, str):
        return name
    if "://" not in name:
        return Folder(Path(name))
    from fpocli.store.bucket import Bucket

    return Bucket(name)


class Folder:
    """A folder on a disk."""

    attempts = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> Path:
        """See Place."""
        return self.path

    def exists(self, key: str = "") -> bool:
        """See Place."""
        return (self.path / key).is_file() if key else self.path.exists()

    def is_empty(self) -> bool:
        """See Place."""
        return not self.path.exists() or is_empty(self.path)

    def read(self, key: str) -> bytes:
        """See Place.

        Raises:
            OSError: it cannot be read.
        """
        return (self.path / key).read_bytes()

    def write(self, key: str, content: bytes) -> None:
        """See Place."""
        file = self.path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several threads may write a file at once.
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        partial.write_bytes(content)
        partial.replace(file)

    def delete(self, key: str) -> None:
        """See Place."""
        (self.path / key).unlink(missing_ok=True)

    def files(self, prefix: str = "") -> Iterator[str]:
        """See Place. Files that a crash left while they were written do not count."""
        for file in sorted((self.path / prefix).rglob("*")):
            if file.is_file() and file.suffix != ".partial":
                yield file.relative_to(self.path).as_posix()

    def clear(self) -> None:
        """See Place."""
        remove_folder(self.path)

    def clear_partial(self) -> None:
        """See Place."""
        for left in self.path.rglob("*.partial"):
            left.unlink()

    def leads_out(self, key: str) -> bool:
        """See Place."""
        return not (self.path / key).resolve().is_relative_to(self.path.resolve())

    def read_beside(self, suffix: str) -> str:
        """See Place."""
        file = Path(self.beside(suffix))
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def write_beside(self, suffix: str, text: str) -> None:
        """See Place."""
        file = Path(self.beside(suffix))
        if text:
            replace_text(file, text)
        else:
            file.unlink(missing_ok=True)

    def beside(self, suffix: str) -> str:
        """See Place."""
        return str(self.path.with_name(self.path.name + suffix))

    def free_bytes(self) -> int | None:
        """See Place."""
        parent = self.path.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(parent).free

    def for_zarr(self) -> Any:
        """See Place."""
        return self.path

    def together(self, reads: Sequence[Callable[[], T]]) -> list[T]:
        """See Place."""
        return [read() for read in reads]


def cannot_reach(name: Path | str, error: Exception) -> UserError:
    """The error of a place that does not answer, or refuses."""
    return UserError(
        # What follows on other lines is for the library's authors.
        f"{name} cannot be reached: {str(error).partition(chr(10))[0]}",
        "check the network and the credentials, and run the same command again; what is finished "
        "is kept",
    )
