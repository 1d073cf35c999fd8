"""The flags of fpo cache for log-probabilities that another program computed."""

from dataclasses import dataclass
from typing import Annotated, Any

from typer import Option

from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Where the reference's log-probabilities come from, if not from the model."""

    HEADING = "Log-probabilities from elsewhere"

    reference_logps: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Take the reference's log-probabilities from this file, row by row of the data, "
            "and score only a few pairs to check them: the data set of TRL's "
            "precompute_ref_log_probs, or open-instruct's cache, a file .pt. If the rows of --data "
            "have TRL's token ids, these are the store's. For a store without features.",
        ),
    ] = None
    reference_averages: Annotated[
        bool,
        Option(
            "--reference-averages",
            help="The file of --reference-logps holds averages per token, not sums; open-instruct "
            "writes them for dpo_norm.",
        ),
    ] = False


def check_import(config: Any) -> None:
    """Refuse flags of fpo cache that an import leaves nothing to do.

    Raises:
        UserError: it names one.
    """
    if config.reference_logps is None:
        if config.reference_averages:
            raise UserError(
                "--reference-averages says what --reference-logps holds", "name its file"
            )
        return
    for flag, value in (
        ("--layer", config.layer),
        ("--distributions", config.distributions != "0"),
        ("--workers", (config.workers or 1) > 1),
        ("--ray", config.ray),
        ("--deduplicate", config.deduplicate),
        ("a mixture of several --data", len(config.data) > 1),
    ):
        if value:
            raise UserError(
                f"--reference-logps scores no pairs, so it goes without {flag}",
                "leave one of the two out",
            )
