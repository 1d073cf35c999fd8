"""Tables of fpo features find, show and diff for a terminal."""

from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

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


def show_found(result: dict[str, Any], out: Console) -> None:
    """Print the result of interpretation.find."""
    against = ""
    if result["against"]:
        against = f" against {result['background_texts']} of {result['against']}"
    out.print(
        f"{len(result['features'])} features of {result['texts']} texts of {result['target']}"
        f"{against}\n{result['model']}, {result['site']}, SAE {result['sae']}\n"
    )
    if not result["features"]:
        return
    heads = ("feature", "mean", "backgr.", "peak", "backgr.", "fires in", "backgr.", "effect", "q")
    table = Table(*heads, box=None, header_style="")
    for one in result["features"]:
        table.add_row(
            str(one["feature"]),
            f"{one['mean']:.3g}",
            f"{one['background_mean']:.3g}",
            f"{one['peak']:.3g}",
            f"{one['background_peak']:.3g}",
            f"{one['share']:.0%}",
            f"{one['background_share']:.0%}",
            f"{one['effect']:.2f}",
            f"{one['q']:.2g}",
        )
    out.print(table)
    out.print("\nWhere they are largest")
    for one in result["features"]:
        _show_contexts(one, out)


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
        ("mean of stored values, else 0", result["values"]["mean"], ".4g"),
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


def show_diff(result: dict[str, Any], out: Console) -> None:
    """Print the result of interpretation.diff."""
    out.print(
        f"Change of the mean activation from the reference to the policy at {result['site']}, over "
        f"{result['pairs']:,} pairs"
    )
    table = Table("run", "", "rose", "fell", "sum of squares", box=None, header_style="")
    for number, run in enumerate(result["runs"], 1):
        table.add_row(
            f"{number}  {run['run']}", run["method"] or "", f"{run['rose']:,}", f"{run['fell']:,}",
            f"{run['mean_square']:.4g}",
        )  # fmt: skip
    out.print(table)
    out.print(f"(rose and fell beyond noise: at most {result['rate']:.0%} of them by chance)\n")
    several = len(result["runs"]) > 1
    own = ["chosen", "rejected", "q"] if not several else []
    changes = [f"change in {number}" for number in range(1, len(result["runs"]) + 1)]
    table = Table(
        "feature", "before", *(changes if several else ["change"]), *own, box=None, header_style=""
    )
    for row in result["features"]:
        first = row["runs"][0]
        cells = [str(row["feature"]), f"{first['before']:.3g}"]
        for one in row["runs"]:
            beyond = " *" if one["q"] <= result["rate"] else ""
            cells.append(f"{one['mean']:+.3g} ± {one['error']:.2g}{beyond}")
        if not several:
            cells += [f"{first['chosen']:+.3g}", f"{first['rejected']:+.3g}", f"{first['q']:.2g}"]
        table.add_row(*cells)
    out.print(table)
    out.print("± is the standard error over pairs; * marks a change beyond noise")
    if any(row["contexts"] or row["label"] for row in result["features"]):
        out.print("\nTokens they fire on, where they changed most")
        for row in result["features"]:
            _show_contexts(row, out)


def _show_contexts(one: dict[str, Any], out: Console) -> None:
    """A feature's label, address and contexts."""
    about = [text for text in (one.get("label"), one.get("page")) if text]
    out.print(f"{one['feature']:>7}  {'; '.join(about)}".rstrip())
    for found in one["contexts"]:
        out.print(f"{found['peak']:>12.3g}  {context_text(found)}")
