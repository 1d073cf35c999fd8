"""The settings of fpo inspect."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from fpocli.config.checks import check_values
from fpocli.config.shared import JSON, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError


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
            help="Where the store's model is now, for the texts of --pair and --html. Default: the "
            "path recorded in the store."
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
    html: Annotated[
        str | None,
        Option(metavar="FILE", help="Write all of it, with example pairs, as one HTML page."),
    ] = None
    feature: Annotated[
        int | None,
        Option(
            min=0,
            help="With --html, show the pairs where this feature is largest, and on which tokens "
            "it fires; the model is run for it.",
        ),
    ] = None
    at: Annotated[
        str | None,
        Option(
            metavar="SITE",
            help="Hook point of --feature, such as layer_25.resid_post. Default: the store's only "
            "one.",
        ),
    ] = None
    sae: Annotated[
        str | None,
        Option(help="Where the SAE of --feature is now. Default: the path recorded in the store."),
    ] = None
    device: Annotated[
        str | None, Option(help="Of --feature: cpu, cuda, ... Default: cuda if available.")
    ] = None
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.feature is not None and self.html is None:
            raise UserError("--feature is part of the page", "name the page with --html FILE")
        if self.html is not None and self.pair is not None:
            raise UserError(
                "--pair and --html show different things",
                "use one of them; the page chooses its example pairs",
            )
