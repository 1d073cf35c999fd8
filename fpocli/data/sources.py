"""Where preference data come from: files, saved data sets and the hub -> raw rows."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

from fpocli.config import DEFAULT_DATA, DataSettings
from fpocli.data.files import KINDS, file_rows, kind_of
from fpocli.system.errors import UserError
from fpocli.system.files import sha256_of
from fpocli.system.hub import hub_errors
from fpocli.system.json_yaml import is_file_name, read_json

_WEIGHT = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Source:
    """A data set that was opened.

    Args:
        open_rows: starts reading its rows.
        identity: what the store records of it.
        score_margin: of scored answers, by how much the best must exceed the worst.
        deduplicate: whether of equal pairs only the first is used.
        weight: in a mixture, or None.
        token_ids: whether its rows have token ids, which are used in the place of text.
    """

    open_rows: Callable[[], Generator[tuple[str, Any]]]
    identity: dict[str, Any]
    score_margin: float = 0.0
    deduplicate: bool = False
    weight: float | None = None
    token_ids: bool = False

    def rows(self) -> Generator[tuple[str, Any]]:
        """Its rows from the first one on, up to the limit. Each has its place, such as
        "pairs.jsonl, line 3", and its value, or a BadRow if it cannot be read. A file that is left
        early is closed at once."""
        with closing(self.open_rows()) as rows:
            yield from islice(rows, self.identity["limit"])

    def first(self, count: int) -> Self:
        """The same source with at most so many rows."""
        limit = min(self.identity["limit"] or count, count)
        return replace(self, identity=self.identity | {"limit": limit})


def open_source(
    data: str,
    split: str | None,
    limit: int | None,
    *,
    config_name: str | None = None,
    score_margin: float = 0.0,
    deduplicate: bool = False,
) -> Source:
    """Open preference data.

    Args:
        data: a file (see files.py), a folder of Parquet files or of datasets' save_to_disk, or a
            hub id, OWNER/NAME or OWNER/NAME@REVISION.
        split: the split of a data set; None is its default.
        limit: read only this many rows.
        config_name: of the data set on the hub.
        score_margin: of scored answers, by how much the best must exceed the worst.
        deduplicate: use only the first of equal pairs.

    Raises:
        UserError: it does not exist, or is of a kind that fpo does not read.
    """
    path = Path(data)
    open_rows: Callable[[], Generator[tuple[str, Any]]]
    revision, fingerprint = None, ""
    parquet: list[Path] = []
    if path.is_dir() and not _is_saved(path):
        parquet, split = _parquet_folder(path, split)
    if path.is_file():
        if not kind_of(path):
            raise UserError(
                f"the data file {path} is not one of {', '.join(KINDS)}",
                "convert it to JSONL: one JSON object per line",
            )
        open_rows, fingerprint, split = partial(file_rows, path), sha256_of(path), None
    elif parquet:
        open_rows = partial(_rows_of, parquet)
        sums = "".join(f"{file.relative_to(path)} {sha256_of(file)}\n" for file in parquet)
        fingerprint = hashlib.sha256(sums.encode()).hexdigest()
    elif kind_of(path) and not path.is_dir():
        raise UserError(f"the data file {data} does not exist", "check the path of --data")
    else:
        split = split or ("train_prefs" if data == DEFAULT_DATA else "train")
        table = _load_dataset(data, path, split, config_name)
        split = str(table.split or split)
        open_rows = partial(_table_rows, data, table)
        fingerprint = table._fingerprint
        checksums = table.info.download_checksums or {}
        revision = next((url.split("@")[1].split("/")[0] for url in checksums if "@" in url), None)
    identity: dict[str, Any] = {
        "source": data,
        "split": split,
        "revision": revision,
        "limit": limit,
        "fingerprint": fingerprint,
    }
    # Stores that were made before have none of these.
    chosen = {
        "config_name": config_name,
        "score_margin": score_margin,
        "deduplicate": deduplicate,
    }
    identity |= {name: value for name, value in chosen.items() if value}
    return Source(open_rows, identity, score_margin, deduplicate)


def sources_of(config: DataSettings) -> list[Source]:
    """The data that settings name, one source for each --data; raises as `open_source`."""
    count = len(config.data)

    def each(values: list[Any]) -> list[Any]:
        return values * count if len(values) == 1 else values or [None] * count

    splits, names = each(config.split), each(config.config_name)
    opened = []
    known = set()
    for data, split, name in zip(config.data, splits, names, strict=True):
        path, weight = split_weight(data)
        key = os.path.realpath(path) if os.path.exists(path) else path, split, name  # noqa: PTH110
        if key in known:
            raise UserError(f"--data {path} is named twice", "name each once, with a weight")
        known.add(key)
        source = open_source(
            path,
            split,
            config.limit,
            config_name=name,
            score_margin=config.score_margin,
            deduplicate=config.deduplicate,
        )
        opened.append(replace(source, weight=weight))
    return opened


def identity_of(sources: list[Source]) -> dict[str, Any]:
    """What a store records of its data: of one source its identity, of several all of theirs."""
    if len(sources) == 1:
        return sources[0].identity
    parts = [
        source.identity | ({"weight": source.weight} if source.weight else {}) for source in sources
    ]
    sums = "".join(f"{part['fingerprint']} {part.get('weight')}\n" for part in parts)
    return {
        "source": f"a mixture of {len(sources)} sources",
        "split": None,
        "revision": None,
        "fingerprint": hashlib.sha256(sums.encode()).hexdigest(),
        "sources": parts,
    }


def split_weight(data: str) -> tuple[str, float | None]:
    """SOURCE and weight of SOURCE:WEIGHT, or of SOURCE alone.

    Raises:
        UserError: the weight is 0, or too large for a number.
    """
    path, _, weight = data.rpartition(":")
    # Where pathlib raises an error for a long name, this says no.
    if not _WEIGHT.fullmatch(weight) or not path or os.path.exists(data):  # noqa: PTH110
        return data, None
    if not 0 < float(weight) < math.inf:
        raise UserError(
            f"--data {data[:200]} has a weight that is not above 0, or too large",
            "leave the source out, or give it a weight such as 0.5",
        )
    return path, float(weight)


def _parquet_folder(path: Path, split: str | None) -> tuple[list[Path], str | None]:
    """The Parquet files of a folder and the split that they are; none if it has none. Of names such
    as train-00000-of-00002.parquet, or a folder train, those of one split are taken."""
    files = sorted(path.rglob("*.parquet"))
    wanted = split or "train"
    of_split = [file for file in files if wanted in (file.stem.partition("-")[0], file.parent.name)]
    if files and split and not of_split:
        raise UserError(
            f"{path} has no Parquet files of the split {split}",
            f"it has {', '.join(str(file.relative_to(path)) for file in files[:5])}",
        )
    return (of_split, wanted) if of_split else (files, None)


def _rows_of(files: list[Path]) -> Generator[tuple[str, Any]]:
    for file in files:
        yield from file_rows(file)


def _table_rows(data: str, table: Any) -> Generator[tuple[str, Any]]:
    yield from ((f"{data}, row {i}", row) for i, row in enumerate(table))


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


def _is_saved(path: Path) -> bool:
    """Whether a folder is one of datasets' save_to_disk."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_dataset(data: str, path: Path, split: str, config_name: str | None) -> Any:
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
    name, _, revision = data.partition("@")
    with hub_errors(f"the data set {data}"):
        try:
            return datasets.load_dataset(name, config_name, split=split, revision=revision or None)
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            raise UserError(
                f"the data set {data} is neither a local path nor on the hub",
                "check the spelling; a private one needs `hf auth login`",
            ) from error
        except ValueError as error:
            raise UserError(
                f"the data set {data} cannot be read: {error}",
                "name another --split or --config-name",
            ) from error
