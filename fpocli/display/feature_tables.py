"""Tables of fpo features for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


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
