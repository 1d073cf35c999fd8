"""The settings of fpo export."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option

from fpocli.config.checks import check_values
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the card of a trained model, or of a store, and push either to the hub.

    A model's card has its method, its command and what fpo eval measured.
    """

    source: Annotated[str, Argument(metavar="RUN|STORE", help="Folder of a run, or a store.")]
    out: Annotated[
        str | None,
        Option(
            help="Of a run: copy the model to this new folder, with its card. Default: the card "
            "is written into RUN/final.",
        ),
    ] = None
    cache: Annotated[
        str | None,
        Option(help="Of a run: where its store is now. Default: where it was in training."),
    ] = None
    push_to_hub: Annotated[
        str | None,
        Option(
            metavar="OWNER/NAME",
            help="Create or update this repository: a model, or a data set for a store. Needs a "
            "token: `hf auth login`, or HF_TOKEN.",
        ),
    ] = None
    private: Annotated[
        bool, Option("--private", help="If the repository is created, only its owner sees it.")
    ] = False

    def __post_init__(self) -> None:
        check_values(self)
        name = self.push_to_hub
        if name is not None and (name.count("/") != 1 or not all(name.split("/"))):
            raise UserError(f"--push-to-hub {name} is no name of a repository", "write OWNER/NAME")
        if self.private and name is None:
            raise UserError("--private is of --push-to-hub", "name a repository, or leave it out")
