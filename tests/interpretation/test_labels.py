"""Neuronpedia's descriptions and pages; the file is somebody else's."""

import gzip
import json

import pytest

from fpocli import UserError
from fpocli.interpretation.labels import neuronpedia_page, read_labels

SOURCE = "gemma-2-2b/25-gemmascope-res-16k"


def line(index, description, **changes):
    """A line as the export has it."""
    entry = {
        "modelId": "gemma-2-2b",
        "layer": "25-gemmascope-res-16k",
        "index": index,
        "description": description,
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        "embedding": "[0.1, 0.2]",
    }
    return json.dumps(entry | changes) + "\n"


LINES = line("7", "apologies") + line("12", "lists\n of\x1b[2J food") + "\n" + line("7", "later")


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_description_of_each_feature_is_read(tmp_path, packed):
    file = tmp_path / ("batch-0.jsonl.gz" if packed else "batch-0.jsonl")
    file.write_bytes(gzip.compress(LINES.encode()) if packed else LINES.encode())
    # No character that controls a terminal is left.
    assert read_labels(str(file)) == {7: "apologies", 12: "lists of [2J food"}
    assert read_labels(str(file), SOURCE)[7] == "apologies"


def test_batches_may_be_concatenated(tmp_path):
    file = tmp_path / "labels.jsonl.gz"
    parts = [line("1", "one"), line("300", None), line(301, "x" * 999)]
    file.write_bytes(b"".join(gzip.compress(part.encode()) for part in parts))
    assert read_labels(str(file)) == {1: "one", 301: "x" * 200}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no descriptions"),
        (b"{}", "line 1 of .* has no feature number `index`"),
        (b"[1]", "has no text `description`"),
        (line("1", "one").encode() + b"{", "line 2 of .* is not valid JSON"),
        (b"\xff\xfe\xfa", "is not valid JSON"),
        (b"[" * 99_999, "is not valid JSON"),
        (line("-1", "one").encode(), "has no feature number"),
        (line(True, "one").encode(), "has no feature number"),
        (line("9" * 10, "one").encode(), "has no feature number"),
        (line("1", ["one"]).encode(), "has no text `description`"),
        (line("1", "one", layer="24-gemmascope-res-16k").encode(), "is about the SAE .*24-gemma"),
        (b"x" * 2**20, "has a line of over 1,048,576 bytes"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    for file in (tmp_path / "labels.jsonl", tmp_path / "labels.jsonl.gz"):
        # Bytes that do not compress keep the packed file from expanding too much.
        file.write_bytes(content if file.suffix == ".jsonl" else gzip.compress(content, 0))
        with pytest.raises(UserError, match=message):
            read_labels(str(file), SOURCE)


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "labels.jsonl.gz"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_labels(str(file))
    whole = gzip.compress((line("1", "one") * 99).encode())
    for content in (LINES.encode(), whole[:-20], whole[:20] + b"\0" * 9 + whole[29:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            read_labels(str(file))


def test_labels_that_expand_without_end_are_refused(tmp_path):
    file = tmp_path / "labels.jsonl.gz"
    file.write_bytes(gzip.compress((line("1", "one") * 20_000).encode()))
    with pytest.raises(UserError, match="expands more than 100 times"):
        read_labels(str(file))


def test_pages():
    assert neuronpedia_page(SOURCE, 7) == (
        "https://www.neuronpedia.org/gemma-2-2b/25-gemmascope-res-16k/7"
    )
    for wrong in ("", "gemma", "a/b/c", 'a/b"><script>', "javascript:/x"):
        assert neuronpedia_page(wrong, 7) is None
    assert neuronpedia_page(None, 7) is None
