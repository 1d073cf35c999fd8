"""Tables of fpo features contrast, find and diff for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from fpocli.display.contexts import show_contexts


def show_contrast(shown: dict[str, Any], out: Console) -> None:
    """Print the result of interpretation.contrast.contrast_store."""
    out.print(
        f"{shown['store']}, {shown['site']}, {shown['pairs']:,} pairs\n"
        f"Of {shown['d_sae']:,} features, {shown['tested']:,} differ in some pair; "
        f"{shown['found']:,} are found at a false discovery rate of {shown['rate']:.2g}."
    )
    if (share := shown["stored_share"]) is not None:
        out.print(f"The store has {share:.1%} of the sum of all pooled features.")

    out.print("\nStyle, mean per response")
    table = Table("", "chosen", "rejected", "difference", "", box=None, header_style="")
    for row in shown["style"]:
        table.add_row(
            row["name"],
            *(f"{row['mean'][side]:.3g}" for side in ("chosen", "rejected")),
            f"{row['difference']:+.3g}",
            "[{:+.2g}, {:+.2g}]".format(*row["interval"]),
        )
    out.print(table)

    out.print(
        "\nFeatures: share of chosen and rejected responses where they are > 0, mean difference of "
        "their values,\neffect size, and what is left of the difference at equal length, and at "
        "equal style"
    )
    table = Table(box=None, header_style="")
    for head in ("feature", "> 0", "difference", "effect", "q", "length", "style"):
        table.add_column(head, no_wrap=True)
    for row in shown["features"]:
        table.add_row(
            str(row["feature"]),
            " ".join(f"{row['frequency'][side]:4.0%}" for side in ("chosen", "rejected")),
            f"{row['difference']:+.3g}",
            _effect(row),
            f"{row['q']:.2g}" if row["q"] else "<1e-300",
            *(_left(row[f"at_equal_{name}"]) for name in ("length", "style")),
        )
    out.print(table)
    show_labels(shown["features"], out)


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
    heads = ("feature", "mean", "backgr.", "peak", "backgr.", "fires in", "backgr.", "effect", "p")
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
            "-" if one["effect"] is None else f"{one['effect']:.2f}",
            "-" if one["p"] is None else f"{one['p']:.2g}",
        )
    out.print(table)
    if any(one["contexts"] or one["label"] or one["page"] for one in result["features"]):
        out.print("\nWhere they are largest")
        for one in result["features"]:
            show_contexts(one, out)


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
            f"{run['sum_of_squares']:.4g}",
        )  # fmt: skip
    out.print(table)
    out.print(
        f"(rose and fell beyond noise; {result['rate']:.0%} of them are expected to be false)\n"
    )
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
            show_contexts(row, out)


def show_labels(rows: list[dict[str, Any]], out: Console) -> None:
    """Print the label and the Neuronpedia page of each feature that has one of them."""
    if known := [row for row in rows if row["label"] or row["page"]]:
        out.print("\nNeuronpedia")
    for row in known:
        out.print(f" {row['feature']:<7}", *filter(None, (row["label"], row["page"])), sep="  ")


def _left(about: dict[str, Any]) -> str:
    return "-" if about["explained"] is None else f"{1 - about['explained']:.0%}"


def _effect(row: dict[str, Any]) -> str:
    if row["effect"] is None:
        return "-"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(row["effect"], *row["interval"])
