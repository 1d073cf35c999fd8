"""Preference data in its usual layouts -> Pair.

Layouts, told apart row by row:
    text            prompt, chosen, rejected are strings
    messages        prompt is a list of messages; chosen, rejected are the assistant's messages
    UltraFeedback   chosen, rejected are whole conversations, with or without a prompt column
    HH-RLHF         chosen, rejected are transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..."
"""

import hashlib
import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fpocli.config import DEFAULT_DATA
from fpocli.data.dropped import Drops
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import is_file_name, read_json
from fpocli.system.model_folder import hub_errors

Message = dict[str, str]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLE = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Args:
        prompt: the conversation up to the answer, as chat messages.
        chosen: the preferred answer.
        rejected: the other answer.
        row: its row in the source, from 0.
        place: where people find it, such as "pairs.jsonl, line 3".
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    row: int
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Source:
    """A data set: `rows` yields its raw rows with their places, a BadRow for one that cannot be
    read; `identity` says what they are."""

    rows: Generator[tuple[str, Any]]
    identity: dict[str, Any]


def open_source(data: str, split: str | None, limit: int | None) -> Source:
    """Open preference data.

    Args:
        data: a JSON, JSONL or Parquet file, a folder of datasets' save_to_disk, or a hub id.
        split: the split of a data set; None takes its default.
        limit: read only the first so many rows.

    Returns:
        The rows, each with a name for messages ("pairs.jsonl, line 3"), and their identity.

    Raises:
        UserError: nothing readable is there.
    """
    path = Path(data)
    if path.is_file():
        rows, revision, split = _file_rows(path), None, None
        with path.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
    elif path.suffix in (".json", ".jsonl", ".parquet") and not path.is_dir():
        raise UserError(f"the data file {data} does not exist", "check the path given to --data")
    else:
        split = split or ("train_prefs" if data == DEFAULT_DATA else "train")
        table = _load_dataset(data, path, split)
        split = str(table.split or split)
        rows = ((f"{data}, row {i}", row) for i, row in enumerate(table))
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
    return Source(_first(rows, limit), identity)


def _first(rows: Generator[Any], limit: int | None) -> Generator[Any]:
    """The first rows; a file that is left early is closed at once."""
    with closing(rows):
        yield from islice(rows, limit)


def read_pairs(source: Source, drops: Drops) -> Iterator[Pair]:
    """The pairs of a source, in order; rows that are none go to `drops`."""
    with closing(source.rows) as rows:
        for number, (place, row) in enumerate(rows):
            drops.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                pair = _parse(row, number, place)
            except BadRow as bad:
                drops.add(bad.reason, number, place, bad.detail)
            else:
                yield pair


class BadRow(Exception):
    """A row that is no pair.

    Args:
        reason: the kind of mistake, as docs/data.md lists them.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _parse(row: Any, number: int, place: str) -> Pair:
    if not isinstance(row, dict):
        raise BadRow("no object", f"it is {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadRow("missing field", name)
        if row[name] is None:
            raise BadRow("null field", name)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong type", "chosen is text and rejected is not, or the other way round")
    if isinstance(chosen, str) and prompt is not None:
        head = [_message("user", prompt)] if isinstance(prompt, str) else _messages(prompt)
        answers = [_message("assistant", text) for text in (chosen, rejected)]
        return _pair(head, answers, number, place)
    if isinstance(chosen, str):
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    else:
        chosen, rejected = _messages(chosen), _messages(rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        prompt = [_message("user", prompt)]
    if isinstance(prompt, list):
        head = _messages(prompt)
        chosen, rejected = _without(head, chosen), _without(head, rejected)
    else:
        # The conversations share all turns but the last.
        head = chosen[:-1]
        if rejected[:-1] != head:
            raise BadRow("different prompts", "turns before the last differ")
        chosen, rejected = chosen[-1:], rejected[-1:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise BadRow("not one answer", "each side must end in one answer after the prompt")
    return _pair(head, [chosen[0], rejected[0]], number, place)


def _pair(head: list[Message], answers: list[Message], number: int, place: str) -> Pair:
    if any(answer["role"] != "assistant" for answer in answers):
        raise BadRow("wrong role", "an answer must be an assistant message")
    if not any(message["content"].strip() for message in head):
        raise BadRow("empty prompt")
    chosen, rejected = (answer["content"] for answer in answers)
    if not chosen.strip() or not rejected.strip():
        raise BadRow("empty response", "" if chosen.strip() else "chosen")
    return Pair(head, chosen, rejected, number, place)


def _without(head: list[Message], conversation: list[Message]) -> list[Message]:
    return conversation[len(head) :] if conversation[: len(head)] == head else conversation


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow("wrong type", "a message's role and content must be text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow("half a character", "a lone surrogate") from error
    return {"role": role, "content": content}


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow("wrong type", "messages must be a list")
    if not value:
        raise BadRow("empty messages")
    for item in value:
        if not isinstance(item, dict):
            raise BadRow("wrong type", "a message must be an object with role and content")
        for name in ("role", "content"):
            if name not in item:
                raise BadRow("missing field", f"{name} of a message")
    return [_message(item["role"], item["content"]) for item in value]


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's transcript as messages."""
    head, *parts = _TURN.split(text)
    if head.strip() or not parts:
        raise BadRow("missing field", "prompt; and the text is no Human/Assistant transcript")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [_message(_ROLE[speaker], content) for speaker, content in turns]


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
            raise UserError(f"{path}, line {number}: no UTF-8 text, {error.reason}") from error
        # Brackets nested too deep, or a number of thousands of digits, whose place json keeps.
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path} is beyond what can be read: {error}") from error
        if not isinstance(rows, list):
            raise UserError(f"{path} does not hold a list of pairs", "write [{...}, {...}]")
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}, line {number}", json.loads(line.decode("utf-8-sig"))
                # A line nested too deep is a RecursionError.
                except (ValueError, RecursionError) as error:
                    yield f"{path}, line {number}", BadRow("broken line", str(error))
    else:
        raise UserError(
            f"{path} is of no known kind", "data files end in .json, .jsonl or .parquet"
        )


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
            f"the data set {path} names {outside[0]!r}, which is no file right inside its folder",
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
                f"the folder {data} holds no readable data set: {error}",
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
