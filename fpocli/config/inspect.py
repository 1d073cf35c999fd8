"""The settings of fpo inspect."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what is in a store: provenance, lengths, margins, features, single pairs."""

    store: Annotated[str, Argument(help="The store.")]
    pair: Annotated[
        int | None, Option(min=0, help="Show one pair: texts, scores, largest features.")
    ] = None
    model: Annotated[
        str | None,
        Option(
            help="Where the store's model is now, for the texts of --pair. Default: the path "
            "recorded in the store."
        ),
    ] = None
    verify: Annotated[
        bool, Option("--verify", help="Read everything and check every checksum.")
    ] = False
    plot: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Draw the 50 largest mean features (the paper's Figure 2, left) to a PNG file.",
        ),
    ] = None
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False
