"""Tables of fpo features show and steer for a terminal."""

from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from fpocli.display.contexts import context_text


def show_feature(result: dict[str, Any], out: Console) -> None:
    """Print the result of interpretation.show."""
    about = [text for text in (result["label"], result["page"]) if text]
    out.print(f"feature {result['feature']} of {result['store']}, {result['site']}")
    for line in about:
        out.print(line)
    table = Table("", "chosen", "rejected", box=None, header_style="")
    rows = (
        ("fires in (share of responses)", result["frequency"], ".1%"),
        ("among the stored (responses)", result["stored"], ",d"),
        ("mean, not stored counted as 0", result["values"]["mean"], ".4g"),
    )
    for title, sides, form in rows:
        table.add_row(title, *(format(sides[side], form) for side in ("chosen", "rejected")))
    out.print()
    out.print(table)
    out.print(f"mean over all {2 * result['pairs']:,} responses: {result['mean']:.4g}")
    values = result["values"]
    if values["counts"]:
        table = Table("stored values", "chosen", "rejected", box=None, header_style="")
        edges = values["edges"]
        for row, (low, high) in enumerate(pairwise(edges)):
            counts = (f"{values['counts'][side][row]:,}" for side in ("chosen", "rejected"))
            table.add_row(f"{low:.4g} to {high:.4g}", *counts)
        out.print()
        out.print(table)
    table = Table("pair", "response", "value", box=None, header_style="")
    for one in result["largest"]:
        table.add_row(str(one["pair"]), one["side"], f"{one['value']:.4g}")
    out.print("\nPairs in which it is largest")
    out.print(table)
    if result["contexts"]:
        out.print("\nTokens it fires on (« » where the activation is at least half of the largest)")
        for found in result["contexts"]:
            place = f"{found['pair']} {found['side']}"
            out.print(f"{place:>14} {found['peak']:>8.3g}  {context_text(found)}")


def show_steering(result: dict[str, Any], out: Console) -> None:
    """Print the result of interpretation.steer: every prompt's two samples side by side."""
    changes = [f"feature {item['feature']} {item['value']:+g}" for item in result["added"]]
    changes += [f"feature {feature} ablated" for feature in result["ablated"]]
    out.print(f"{result['model']}, {result['site']} of {result['sae']}: {', '.join(changes)}")
    for sample in result["samples"]:
        out.print(f"\n── {_printable(sample['prompt'])}")
        table = Table(box=None, header_style="", padding=(0, 2, 0, 0), expand=True)
        table.add_column("without", ratio=1, overflow="fold")
        table.add_column("with", ratio=1, overflow="fold")
        sides = [sample["plain"], sample["steered"]]
        table.add_row(*(_printable(side["text"]) for side in sides))
        table.add_row(*map(_about_sample, sides), style="dim")
        out.print(table)


def _about_sample(side: dict[str, Any]) -> str:
    end = "ended" if side["ended"] else "cut off"
    return f"[{side['tokens']} tokens, {end}, entropy {side['entropy']:.2f} nats per token]"


def _printable(text: str) -> str:
    """A model's text, in which nothing can control the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else " " for character in text
    )
