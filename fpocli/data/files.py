"""The rows of one data file: JSONL, JSON, CSV or Parquet, the first three also compressed."""

import csv
import io
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fpocli.data.pairs import BadRow
from fpocli.system.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_PACKED = {".gz": "gzip", ".zst": "zstd"}
# Columns that are no text in any layout; see conversions.py.
_STRUCTURED = {
    "conversations", "messages", "completions", "generations", "responses", "ratings", "rating",
    "scores", "history", "output", "tools",
}  # fmt: skip


def kind_of(path: Path) -> str:
    """Of KINDS, what a name says of a file; "" if it is none of them."""
    unpacked = path.with_suffix("") if path.suffix in _PACKED else path
    kind = unpacked.suffix if unpacked.suffix in KINDS else ""
    return "" if unpacked != path and kind == ".parquet" else kind


def file_rows(path: Path) -> Generator[tuple[str, Any]]:
    """Every row with its place, such as "pairs.jsonl, line 3"; a BadRow for a line that cannot be
    read.

    Raises:
        UserError: the file cannot be read.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    yield from readers[kind_of(path)](path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
        UserError: it is damaged.
    """
    if path.suffix not in _PACKED:
        with path.open("rb") as stream:
            yield stream
        return
    import pyarrow

    packed: Any = pyarrow.input_stream(str(path), compression=_PACKED[path.suffix])
    try:
        with io.BufferedReader(packed) as stream:
            yield stream
    except OSError as error:
        raise UserError(
            f"{path} cannot be decompressed: {error}", "copy it again, or compress it again"
        ) from error


def _jsonl(path: Path) -> Generator[tuple[str, Any]]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line.decode("utf-8-sig"))
            # Brackets nested too deeply raise RecursionError.
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", BadRow("broken line", str(error))


def _json(path: Path) -> Generator[tuple[str, Any]]:
    try:
        with _opened(path) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: {error.msg}",
            "one JSON object per line goes into a file named .jsonl",
        ) from error
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not valid UTF-8, {error.reason}") from error
    # Brackets nested too deeply, or a number of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path} is not a JSON list of pairs",
            "write [{...}, {...}]; a file with one object per line is named .jsonl",
        )
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _csv(path: Path) -> Generator[tuple[str, Any]]:
    """Rows under a line with the names of the columns; a cell may be a JSON list of messages."""
    # Of a cell: texts may be long.
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                yield f"{path}, line {reader.line_num}", _of_cells(row)
        except csv.Error as error:
            raise UserError(
                f"{path}, after line {reader.line_num}: {error}",
                "write it with a CSV library, cells with line ends in quotes",
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8: {error.reason}", "convert it") from error


def _of_cells(row: dict[str | None, Any]) -> Any:
    if None in row:
        return BadRow("broken line", "it has more cells than there are columns")
    try:
        return {name: _cell(str(name), text) for name, text in row.items()}
    except BadRow as bad:
        return bad


def _cell(column: str, text: str | None) -> Any:
    """A cell; what is no text in other kinds of files is JSON in a table.

    Raises:
        BadRow: it is written as Python prints it.
    """
    if not text or (text[0], text[-1]) not in (("[", "]"), ("{", "}")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if column in _STRUCTURED or "'role':" in text or "'from':" in text:
            raise BadRow("wrong type", f"{column} is no JSON; write JSONL or Parquet") from error
        return text
    # An answer may be JSON itself.
    items = value if isinstance(value, list) and value else [value]
    is_talk = all(isinstance(i, dict) and i.keys() >= {"role", "content"} for i in items)
    is_talk |= all(isinstance(i, dict) and i.keys() >= {"from", "value"} for i in items)
    return value if is_talk or column in _STRUCTURED else text


def _parquet(path: Path) -> Generator[tuple[str, Any]]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    # A date beyond year 9999 is a ValueError or OverflowError.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not readable Parquet: {error}") from error
