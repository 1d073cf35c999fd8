"""What both cards are made of: Markdown tables, and names that the hub can link."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fpocli.store.reader import Store


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """A Markdown table of names and values; values may come from elsewhere."""
    lines = ["| | |", "|---|---|", *(f"| {plain(name)} | {plain(value)} |" for name, value in rows)]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as text that ends neither a line nor a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def on_hub(store: Store, name: str) -> str | None:
    """The hub's id of a store's `model` or `data`; None if it was a file or folder."""
    about = store.meta[name]
    named_by_path = name in store.meta.get("paths", {}) or Path(about["source"]).exists()
    source = about["source"].partition("@")[0]
    return source if source.count("/") == 1 and not named_by_path else None


def versions(store: Store) -> str:
    """The versions of the libraries that wrote a store."""
    return ", ".join(f"{name} {version}" for name, version in store.meta["writer"].items())
