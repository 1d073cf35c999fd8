"""TensorBoard: event files in the folder of the run."""

from pathlib import Path
from typing import Any

import yaml

from fpocli.tracking.tracker import Rows, Tracker


class TensorBoard(Tracker):
    """Writes to `tensorboard/` in the run's folder."""

    def __init__(self, folder: Path, settings: dict[str, Any], run: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(folder / self.run)
        if run is None:
            text = yaml.safe_dump(settings, sort_keys=False)
            self._writer.add_text("settings", f"```\n{text}```", 0)

    @staticmethod
    def check() -> None:
        """Nothing: it writes files."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Write the metrics of a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        # Otherwise the last two minutes are lost when the process is killed.
        self._writer.flush()

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows], step: int
    ) -> None:
        """Write numbers, images, and tables as text."""
        import numpy as np
        from PIL import Image

        for name, file in images.items():
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        for name, rows in tables.items():
            self._writer.add_text(name, _markdown(rows), step)
        self.log(numbers, step)

    def close(self, *, complete: bool) -> None:
        """Close the file."""
        self._writer.close()


def _markdown(rows: Rows) -> str:
    heads = list(rows[0]) if rows else []
    lines = [heads, ["---"] * len(heads), *(list(map(_cell, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
