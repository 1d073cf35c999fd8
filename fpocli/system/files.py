"""Files that appear complete, folders that disappear at once, and what a file holds as a hash."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """The path to write a file's content to, so that neither a reader nor a crash ever sees a part
    of it: the file is replaced at the end."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    partial.replace(file)


def replace_text(file: Path, text: str) -> None:
    """Write a text file, as `replaced`."""
    with replaced(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def resolve_last_part(path: str) -> Path:
    """A path as it was typed, but with a link or dots at its end resolved: files next to it must
    be the same ones however it was typed."""
    typed = Path(path)
    return typed.resolve() if typed.is_symlink() or typed.name in ("", "..") else typed


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, or holds only what a crash left of its first file."""
    return folder.is_dir() and all(file.suffix == ".partial" for file in folder.iterdir())


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a crash never leaves a part of it under its name."""
    removed = folder.with_name(f".{folder.name}.fpo-removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)
