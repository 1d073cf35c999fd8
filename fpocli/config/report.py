"""The settings of fpo report."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from fpocli.config.checks import check_values


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page about one or several runs: curves, what was measured, samples, features.

    The page needs no network. A run that fpo eval has measured has more to show.
    """

    runs: Annotated[
        list[str], Argument(metavar="RUN", help="Folders of runs or evaluations, up to 8.")
    ]
    html: Annotated[str, Option(metavar="FILE", help="The page to write.")]
    json: Annotated[bool, Option("--json", help="Print the page's numbers as JSON.")] = False

    def __post_init__(self) -> None:
        check_values(self)
