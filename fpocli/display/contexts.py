"""Tokens in context, for a terminal."""

from typing import Any

from rich.console import Console

# Tokens from this share of the largest activation of a context on are marked.
_MARKED = 0.5


def context_text(context: dict[str, Any]) -> str:
    """A context on one line, the tokens with large activations between « and ».

    Args:
        context: as interpretation.contexts.context makes it.
    """
    parts = []
    least = _MARKED * context["peak"]
    for token, value in zip(context["tokens"], context["activations"], strict=True):
        shown = token.replace("\n", "⏎")
        bare = shown.strip()
        if bare and value >= least > 0:
            shown = shown.replace(bare, f"«{bare}»", 1)
        parts.append(shown)
    return "".join(parts)


def show_contexts(one: dict[str, Any], out: Console) -> None:
    """A feature's label, address and contexts."""
    about = [text for text in (one.get("label"), one.get("page")) if text]
    out.print(f"{one['feature']:>7}  {'; '.join(about)}".rstrip())
    for found in one["contexts"]:
        out.print(f"{found['peak']:>12.3g}  {context_text(found)}")
