"""The settings of fpo compare."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Cache, train and evaluate a grid of runs, and write the paper's tables and figures.

    Finished steps are not repeated, so the same command resumes.
    """

    config_file: Annotated[
        str, Argument(metavar="CONFIG.yaml", help="The grid; examples/paper has some.")
    ]
    plan: Annotated[
        bool,
        Option("--plan", help="Only list the commands: done or not, expected hours and bytes."),
    ] = False
