"""Where preference data come from: files, saved data sets and the hub -> raw rows."""

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fpocli.config import DEFAULT_DATA
from fpocli.data.pairs import BadRow
from fpocli.system.errors import UserError
from fpocli.system.hub import hub_errors
from fpocli.system.json_yaml import is_file_name, read_json

_READ = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """A data set that was opened.

    Args:
        open_rows: starts reading its rows.
        identity: what the store records of it.
    """

    open_rows: Callable[[], Generator[tuple[str, Any]]]
    identity: dict[str, Any]

    def rows(self) -> Generator[tuple[str, Any]]:
        """Its rows from the first one on, up to the limit. Each has its place, such as
        "pairs.jsonl, line 3", and its value, or a BadRow if it cannot be read. A file that is left
        early is closed at once."""
        with closing(self.open_rows()) as rows:
            yield from islice(rows, self.identity["limit"])


def open_source(data: str, split: str | None, limit: int | None) -> Source:
    """Open preference data.

    Args:
        data: a JSON, JSONL or Parquet file, a folder of datasets' save_to_disk, or a hub id.
        split: the split of a data set; None is its default.
        limit: read only this many rows.

    Raises:
        UserError: it does not exist, or is of a kind that fpo does not read.
    """
    path = Path(data)
    open_rows: Callable[[], Generator[tuple[str, Any]]]
    if path.is_file():
        _check_kind(path)
        open_rows, revision, split = partial(_file_rows, path), None, None
        with path.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
    elif path.suffix in _READ and not path.is_dir():
        raise UserError(f"the data file {data} does not exist", "check the path of --data")
    else:
        split = split or ("train_prefs" if data == DEFAULT_DATA else "train")
        table = _load_dataset(data, path, split)
        split = str(table.split or split)
        open_rows = partial(_table_rows, data, table)
        fingerprint = table._fingerprint
        checksums = table.info.download_checksums or {}
        revision = next((url.split("@")[1].split("/")[0] for url in checksums if "@" in url), None)
    identity = {
        "source": data,
        "split": split,
        "revision": revision,
        "limit": limit,
        "fingerprint": fingerprint,
    }
    return Source(open_rows, identity)


def _check_kind(path: Path) -> None:
    """Refuse a file that is not JSON, JSONL or Parquet by its name."""
    if path.suffix in _READ:
        return
    hints = {
        ".csv": "convert it: pandas.read_csv(FILE).to_json('pairs.jsonl', orient='records', "
        "lines=True)",
        ".gz": "decompress it first: gunzip --keep FILE",
        ".zst": "decompress it first: unzstd FILE",
    }
    raise UserError(
        f"the data file {path} is not one of {', '.join(_READ)}",
        hints.get(path.suffix, "convert it to JSONL: one JSON object per line"),
    )


def _table_rows(data: str, table: Any) -> Generator[tuple[str, Any]]:
    yield from ((f"{data}, row {i}", row) for i, row in enumerate(table))


def _file_rows(path: Path) -> Generator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet
        from pyarrow import ArrowException

        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
        # A date beyond year 9999 is a ValueError or OverflowError.
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not readable Parquet: {error}") from error
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
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
            raise UserError(f"{path} is not a JSON list of pairs", "write [{...}, {...}]")
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    else:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}, line {number}", json.loads(line.decode("utf-8-sig"))
                # Brackets nested too deeply raise RecursionError.
                except (ValueError, RecursionError) as error:
                    yield f"{path}, line {number}", BadRow("broken line", str(error))


def _check_saved(path: Path) -> None:
    """Refuse a saved data set that names files outside its folder."""
    named: list[Any] = []
    for file in (path / "dataset_dict.json", *path.glob("state.json"), *path.glob("*/state.json")):
        about = read_json(file) if file.is_file() else {}
        if isinstance(about, dict):
            parts = about.get("_data_files") or []
            named += [part.get("filename") for part in parts if isinstance(part, dict)]
            named += about.get("splits") or []
    if outside := [name for name in named if not is_file_name(name)]:
        raise UserError(
            f"the data set {path} names {outside[0]!r}, which is not directly inside its folder",
            "write it with save_to_disk",
        )


def _load_dataset(data: str, path: Path, split: str) -> Any:
    import datasets

    if path.is_dir():
        _check_saved(path)
        try:
            saved = datasets.load_from_disk(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the folder {data} is not a data set that datasets can load: {error}",
                "write it with save_to_disk",
            ) from error
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"{data} has no split {split}", f"it has {', '.join(saved)}")
        return saved[split]
    with hub_errors(f"the data set {data}"):
        try:
            return datasets.load_dataset(data, split=split)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise UserError(
                f"the data set {data} is neither a local path nor on the hub",
                "check the spelling; a private one needs `hf auth login`",
            ) from error
        except ValueError as error:
            raise UserError(
                f"the data set {data} cannot be read: {error}", "name another --split"
            ) from error
