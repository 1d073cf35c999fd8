"""The settings of fpo doctor."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from fpocli.config.checks import check_values
from fpocli.config.shared import JSON


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine: versions, devices, disk, hub, and every kernel against transformers.

    On request also a bucket for stores (--bucket) and every host of a Ray cluster (--ray).
    """

    bucket: Annotated[
        str | None,
        Option(metavar="URL", help="Write, read and delete a file there, as stores need it."),
    ] = None
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Ask every host of this Ray cluster for its versions: HOST:PORT or auto.",
        ),
    ] = None
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
