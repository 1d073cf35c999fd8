"""Small files, written whole or not at all."""

from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never meets a part of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
