"""Trackio, by its own client; its environment variables (TRACKIO_SPACE_ID, ...) hold."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from fpocli.tracking.tracker import Rows, Tracker


class Trackio(Tracker):
    """A run of Trackio."""

    def __init__(self, folder: Path, settings: dict[str, Any], run: str | None) -> None:
        import trackio

        # Runs are found again by their name, and the folders of many are called run.
        self.run = run or f"{folder.name}-{secrets.token_hex(3)}"
        project = os.environ.get("TRACKIO_PROJECT", "fpo")
        self._run = trackio.init(
            project=project,
            name=self.run,
            # Trackio has no record of a run that got nothing yet.
            resume="allow" if run else "never",
            config=settings,
            embed=False,
        )
        self.where = f"run {self.run}; trackio show --project {project}"

    @staticmethod
    def check() -> None:
        """Nothing: it writes to a local database, or to a Space in the background."""
        import trackio  # noqa: F401

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(numbers), step=step)

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows], step: int
    ) -> None:
        """Send numbers, images and tables."""
        import trackio

        media: dict[str, Any] = {name: trackio.Image(str(file)) for name, file in images.items()}
        for name, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            cells = [[row.get(column) for column in columns] for row in rows]
            media[name] = trackio.Table(columns=columns, data=cells)
        self._run.log(numbers | media, step=step)

    def close(self, *, complete: bool) -> None:
        """Wait until everything is written."""
        import trackio

        self._run.finish()
        # Otherwise Trackio finishes it once more at exit, and prints that. In the thread that ends
        # the process at a signal it knows of no run.
        with suppress(RuntimeError):
            trackio.finish()
