"""Descriptions of features from Neuronpedia, and the address of a feature's page there.

Its export has, for each SAE, files v1/MODEL/SOURCE/explanations/batch-N.jsonl.gz with one JSON
object per line: `modelId`, `layer` (the SOURCE), `index` and `description`, all text, and others.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpocli.system.errors import UserError

_PAGES = "https://www.neuronpedia.org"
_LONGEST_LABEL = 200
# Lines hold an embedding of a few thousand numbers.
_LONGEST_LINE = 2**20
# JSON lines shrink about tenfold; a file that expands more than this was made to fill memory.
_MOST_EXPANSION = 100
_HINT = "use a batch-N.jsonl or .jsonl.gz of Neuronpedia's export, or several in one file"


def read_labels(path: str, source: str | None = None) -> dict[int, str]:
    """The descriptions in a file of Neuronpedia's export.

    Args:
        path: .jsonl or .jsonl.gz; several files may be concatenated.
        source: MODEL/SOURCE of the SAE, which the lines must name; None if it is not known.

    Returns:
        one line of text by feature, the file's first if it has several.

    Raises:
        UserError: the file cannot be read, is damaged, or is of another SAE.
    """
    labels: dict[int, str] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is not valid JSON: {error}", _HINT) from error
        index, text = _parse(entry, f"line {number} of {path}")
        found = f"{entry.get('modelId')}/{entry.get('layer')}"
        if source is not None and found != source:
            raise UserError(
                f"line {number} of {path} is about the SAE {found!r}, not {source}",
                f"use the explanations of {source}",
            )
        if text:
            labels.setdefault(index, text)
    if not labels:
        raise UserError(f"{path} has no descriptions", _HINT)
    return labels


def _lines(path: str) -> Iterator[bytes]:
    try:
        most = _MOST_EXPANSION * Path(path).stat().st_size
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise UserError(f"{path} has a line of over {_LONGEST_LINE:,} bytes", _HINT)
                if file.tell() > most:
                    raise UserError(f"{path} expands more than {_MOST_EXPANSION} times", _HINT)
                yield line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}", "download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", _HINT) from error


def _parse(entry: Any, where: str) -> tuple[int, str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("description"), str | None):
        raise UserError(f"{where} has no text `description`", _HINT)
    index = str(entry.get("index"))
    if not re.fullmatch(r"[0-9]{1,9}", index):
        raise UserError(f"{where} has no feature number `index`", _HINT)
    # Nothing that could control a terminal.
    words = "".join(c if c.isprintable() else " " for c in entry.get("description") or "").split()
    return int(index), " ".join(words)[:_LONGEST_LABEL]


def neuronpedia_page(source: str | None, feature: int) -> str | None:
    """The address of a feature's page.

    Args:
        source: MODEL/SOURCE of the SAE; None if it is not known.
        feature: its index.

    Returns:
        None without a source, or if it is none of Neuronpedia.
    """
    if source is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
        return None
    return f"{_PAGES}/{source}/{feature}"
