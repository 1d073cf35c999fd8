"""Files written whole or not at all, and folders that are gone at once."""

import shutil
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never meets a part of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill never leaves a part of it under its name."""
    removed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)
