"""The settings of fpo saes."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from fpocli.config.checks import check_values
from fpocli.config.shared import JSON


@dataclass(frozen=True, kw_only=True)
class SaesConfig:
    """List the pre-trained SAEs of a model at the hook points that fpo supports, by --sae names."""

    model: Annotated[str, Argument(help="A hub id, gemma-2-2b, ..., or a local folder.")]
    layer: Annotated[
        int | None, Option(min=0, help="Only those of this decoder layer, from 0.")
    ] = None
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
