"""Rows of the data that are left out: counted by reason, listed with their place, or refused."""

import json
from collections import Counter
from itertools import repeat

from fpocli.system.errors import UserError

# Rows listed for each reason.
_LISTED = 1000
_NON_FINITE = "not finite"


class DroppedRows:
    """Counts the rows of a source and which of them are dropped.

    Args:
        strict: raise at the first row that would be dropped.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.read = 0
        self.counts: Counter[str] = Counter()
        self._listed: list[dict[str, str | int]] = []
        self._first, self._first_hint = "", ""

    def add(self, reason: str, row: int, place: str, detail: str = "", hint: str = "") -> None:
        """Drop a row.

        Args:
            reason: one of the reasons in docs/data.md.
            row: its number in the source, from 0.
            place: where to find it, such as "pairs.jsonl, line 3".
            detail: what is wrong with it, if the reason does not say everything.
            hint: how to change it.

        Raises:
            UserError: with `strict`.
        """
        message = f"{place}: {reason}" + (f", {detail}" if detail else "")
        if self.strict:
            raise UserError(
                message, hint or "fix or remove the row; without --strict it is dropped and counted"
            )
        if not self.counts:
            self._first, self._first_hint = message, hint
        self.counts[reason] += 1
        if self.counts[reason] <= _LISTED:
            self._listed.append({"row": row, "place": place, "reason": reason, "detail": detail})

    def nothing_left(self) -> UserError:
        """The error of a source without a usable row; it names the first row and its mistake."""
        if not self.read:
            return UserError("the data have no rows", "check --data and --limit")
        return UserError(
            f"no pair is left of {self.read:,} rows: {self}; the first is {self._first}",
            self._first_hint or "check the data, --max-length and --max-prompt-length",
        )

    def listed(self) -> str:
        """The dropped rows as JSON lines, at most 1,000 per reason."""
        return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in self._listed)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())


def place_in_data(row: int, source: int | None) -> str:
    """A row of the data, such as "row 12", or of a mixture "row 12 of source 0"."""
    return f"row {row}" if source is None else f"row {row} of source {source}"


def list_non_finite(before: str, rows: list[int], sources: list[int] | None) -> str:
    """The list of dropped rows with those that have non-finite scores.

    Args:
        before: the list, as `DroppedRows.listed` or this function made it.
        rows: their numbers in the source.
        sources: which source of a mixture each is in; None without one.
    """
    lines = [line for line in before.splitlines() if f'"reason": "{_NON_FINITE}"' not in line]
    for row, source in zip(rows[:_LISTED], sources or repeat(None)):  # noqa: B905
        place = place_in_data(row, source)
        about = {"row": row, "place": place, "reason": _NON_FINITE, "detail": ""}
        lines.append(json.dumps(about))
    return "".join(line + "\n" for line in lines)
