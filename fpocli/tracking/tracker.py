"""What every tracker can do."""

from pathlib import Path
from typing import Any, Protocol

# Rows of a table, each with all columns by name.
Rows = list[dict[str, Any]]


class Tracker(Protocol):
    """One tracker, with a run of its own open. It imports its client when it is used.

    Args:
        folder: of the run of fpo.
        settings: of the run of fpo.
        run: the id of the tracker's run, to continue it; None begins one.

    Attributes:
        run: that id.
        where: how the user finds it.
    """

    run: str
    where: str

    def __init__(self, folder: Path, settings: dict[str, Any], run: str | None) -> None: ...

    @staticmethod
    def check() -> None:
        """Raise UserError if the user has to do something before a run can be opened."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the metrics of a step. Steps never go back."""

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows], step: int
    ) -> None:
        """Send what was measured after training, by name; images are PNG files."""

    def close(self, *, complete: bool) -> None:
        """Send what is left, and say whether the command came to its end."""
