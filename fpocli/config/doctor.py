"""The settings of fpo doctor."""

from dataclasses import dataclass
from typing import Annotated

from fpocli.config.checks import check_values
from fpocli.config.shared import JSON


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine: versions, devices, disk, hub, and every kernel against transformers."""

    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
