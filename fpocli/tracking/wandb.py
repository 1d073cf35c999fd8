"""Weights & Biases, by its own client; its environment variables (WANDB_...) hold."""

import os
from pathlib import Path
from typing import Any

from fpocli.system.errors import UserError
from fpocli.tracking.tracker import Rows, Tracker


class Wandb(Tracker):
    """A run of W&B."""

    def __init__(self, folder: Path, settings: dict[str, Any], run: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fpo"),
            name=folder.name,
            id=run,
            resume="allow",
            config=settings,
            dir=os.environ.get("WANDB_DIR", folder),
            # fpo's live view and data must not go through it.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own steps only rise, and an evaluation that was interrupted comes a second time.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.run = self._run.id
        self.where = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    @staticmethod
    def check() -> None:
        """Raises UserError if nobody is logged in; it would ask on the terminal."""
        import wandb

        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        if mode in ("online", "run", "shared") and not wandb.login(prompt=False):
            raise UserError(
                "wandb is not logged in",
                "run `wandb login`, set WANDB_API_KEY, or keep the run on this machine with "
                "WANDB_MODE=offline",
            )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._log(numbers, step, step)

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows], step: int
    ) -> None:
        """Numbers become the run's summary."""
        import wandb

        self._run.summary.update(numbers)
        media: dict[str, Any] = {name: wandb.Image(str(file)) for name, file in images.items()}
        for name, rows in tables.items():
            data = [list(row.values()) for row in rows]
            media[name] = wandb.Table(columns=list(rows[0]) if rows else [], data=data)
        self._log(media, step, step + 1)

    def _log(self, values: dict[str, Any], step: int, own_step: int) -> None:
        # Offline, W&B does not know how far earlier commands came.
        self._run.log(values | {"step": step}, step=own_step if self._run.offline else None)

    def close(self, *, complete: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=0 if complete else 1)
