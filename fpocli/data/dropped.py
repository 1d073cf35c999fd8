"""What is left out of the data: counted by reason, listed with its place, or refused."""

import json
from collections import Counter
from pathlib import Path

from fpocli.system.errors import UserError
from fpocli.system.files import replace_text

# Rows listed for each reason.
_LISTED = 1000
_NOT_FINITE = "not finite"


class DroppedRows:
    """Counts the rows of a source and what was dropped of them.

    Args:
        strict: stop at the first row that would be dropped.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.read = 0
        self.counts: Counter[str] = Counter()
        self._listed: list[dict[str, str | int]] = []

    def add(self, reason: str, row: int, place: str, detail: str = "") -> None:
        """Leave a row out.

        Args:
            reason: one of the reasons of docs/data.md.
            row: its number in the source, from 0.
            place: where people find it, such as "pairs.jsonl, line 3".
            detail: what is wrong with it, where the reason does not say all.

        Raises:
            UserError: under --strict.
        """
        if self.strict:
            raise UserError(
                f"{place}: {reason}" + (f", {detail}" if detail else ""),
                "mend or remove the row; without --strict it is dropped and counted",
            )
        self.counts[reason] += 1
        if self.counts[reason] <= _LISTED:
            self._listed.append({"row": row, "place": place, "reason": reason, "detail": detail})

    def write(self, file: Path) -> None:
        """List the dropped rows as JSON lines, at most 1,000 for each reason; no file for none."""
        if self._listed:
            lines = (json.dumps(row, ensure_ascii=True) + "\n" for row in self._listed)
            replace_text(file, "".join(lines))
        else:
            file.unlink(missing_ok=True)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())


def list_non_finite(file: Path, rows: list[int]) -> None:
    """Add to the list the rows whose numbers were not finite.

    Args:
        file: as `DroppedRows.write` wrote it, or none.
        rows: their numbers in the source.
    """
    before = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = [line for line in before if f'"reason": "{_NOT_FINITE}"' not in line]
    for row in rows[:_LISTED]:
        about = {"row": row, "place": f"row {row}", "reason": _NOT_FINITE, "detail": ""}
        lines.append(json.dumps(about))
    if lines != before:
        replace_text(file, "".join(line + "\n" for line in lines))
