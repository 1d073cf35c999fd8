"""Tables of fpo features for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


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
