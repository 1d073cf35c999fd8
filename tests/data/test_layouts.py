"""Every layout and kind of file gives the same pairs; every mistake is reported with its place."""

import csv
import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pytest

from fpocli.data.dropped import DroppedRows
from fpocli.data.layouts import parse_row, read_pairs, require_a_pair
from fpocli.data.pairs import Pair
from fpocli.data.sources import open_source
from fpocli.system.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


# Tabs, both line ends, trailing blanks, a line separator that str.splitlines would cut at.
GOOD = "  ```python\nif x:\n\treturn  x # don't\r\n```\n\n\u00a0é🙂\u2028\x85 \\n {{ x }} \n"
BAD = "No .\n"
ASK = user("What  is\tx?\n")
TALK = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello\n"), ASK]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\n\nHuman: Human: x?\n\nAssistant: "

# Name -> (row, its prompt); the responses are always GOOD and BAD.
LAYOUTS = {
    "text": ({"prompt": ASK["content"], "chosen": GOOD, "rejected": BAD}, [ASK]),
    "text after messages": ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, TALK),
    "messages": (
        {"prompt": TALK, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        TALK,
    ),
    "implicit prompt": (
        {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
        TALK,
    ),
    "UltraFeedback": (
        {
            "prompt": ASK["content"],
            "prompt_id": "0af",
            "chosen": [ASK, assistant(GOOD)],
            "rejected": [ASK, assistant(BAD)],
            "messages": [ASK, assistant(GOOD)],
            "score_chosen": 8.5,
        },
        [ASK],
    ),
    "whole conversations": (
        {"prompt": TALK, "chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)]},
        TALK,
    ),
    "ShareGPT": (
        {
            "conversations": [
                said("human", "Hi"),
                said("gpt", "Hello\n"),
                said("human", ASK["content"]),
            ],
            "chosen": said("gpt", GOOD),
            "rejected": said("gpt", BAD),
            "system": "Be brief.",
        },
        TALK,
    ),
    "axolotl": (
        {"messages": TALK, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        TALK,
    ),
    "Alpaca": (
        {"instruction": "What", "input": "is x?", "chosen": GOOD, "rejected": BAD},
        [user("What\nis x?")],
    ),
    "Alpaca, older": (
        {
            "instruction": ASK["content"],
            "input": "",
            "output": [GOOD, BAD],
            "system": "Be brief.",
            "history": [["Hi", "Hello\n"]],
        },
        TALK,
    ),
    "Intel": (
        {"system": "", "question": ASK["content"], "chosen": GOOD, "rejected": BAD},
        [ASK],
    ),
    "UltraFeedback's scores": (
        {
            "source": "evol_instruct",
            "instruction": ASK["content"],
            "models": ["m", "n", "o"],
            "completions": [
                {"model": "m", "response": "so so", "overall_score": 5.0},
                {"model": "n", "response": GOOD, "overall_score": 8.5},
                {"model": "o", "response": BAD, "overall_score": 1.0},
            ],
        },
        [ASK],
    ),
    "Argilla's ratings": (
        {"input": ASK["content"], "generations": [BAD, "so so", GOOD], "ratings": [1, 3, 4]},
        [ASK],
    ),
    "HH-RLHF": (
        {"chosen": TRANSCRIPT + GOOD, "rejected": TRANSCRIPT + BAD},
        [user("Hi"), assistant("Hello\n"), user("Human: x?")],
    ),
}


def write_json(path, rows):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path = path.with_suffix(".jsonl")
    lines = "\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"\n{lines}\n\n", encoding="utf-8")
    return path


def write_parquet(path, rows):
    path = path.with_suffix(".parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def write_dataset(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def write_splits(path, rows):
    """`rows` as the split train, and their last one as the split test."""
    made = {"train": rows, "test": rows[-1:]}
    splits = {name: datasets.Dataset.from_list(part) for name, part in made.items()}
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def write_gz(path, rows):
    plain = write_jsonl(path, rows)
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    return packed


def write_zst(path, rows):
    plain = write_json(path, rows)
    with pyarrow.output_stream(f"{plain}.zst", compression="zstd") as stream:
        stream.write(plain.read_bytes())
    return plain.with_name(f"{plain.name}.zst")


def write_csv(path, rows):
    """Cells that are no text as JSON, as other programs write them."""
    path = path.with_suffix(".csv")
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {n: v if isinstance(v, str | None) else json.dumps(v) for n, v in row.items()}
            )
    return path


def write_parquet_folder(path, rows):
    """As in a snapshot of the hub, with another split beside it."""
    folder = path / "data"
    folder.mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        if part:
            table = datasets.Dataset.from_list(part)
            table.to_parquet(folder / f"train-{number:05}-of-00002.parquet")
    datasets.Dataset.from_list(rows[-1:]).to_parquet(folder / "test-00000-of-00001.parquet")
    return path


WRITERS = [
    write_json, write_jsonl, write_parquet, write_dataset, write_splits, write_gz, write_zst,
    write_csv, write_parquet_folder,
]  # fmt: skip


def texts(*prompts):
    return [{"prompt": prompt, "chosen": GOOD, "rejected": BAD} for prompt in prompts]


def read(path, split=None, limit=None, dropped=None):
    return list(
        read_pairs(open_source(str(path), split, limit), dropped or DroppedRows(strict=True))
    )


def identity(path, split=None, limit=None):
    return open_source(str(path), split, limit).identity


def refusal(path, split=None):
    with pytest.raises(UserError) as caught:
        read(path, split)
    return caught.value.message


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, write):
    row, prompt = LAYOUTS[layout]
    pairs = read(write(tmp_path / "data", [row] * 3))
    assert pairs == [Pair(prompt, GOOD, BAD, number) for number in range(3)]


def test_layouts_may_be_mixed(tmp_path):
    pairs = read(write_jsonl(tmp_path / "data", [row for row, _ in LAYOUTS.values()]))
    prompts = [prompt for _, prompt in LAYOUTS.values()]
    assert pairs == [Pair(prompt, GOOD, BAD, i) for i, prompt in enumerate(prompts)]


def test_split(tmp_path):
    path = write_splits(tmp_path / "data", texts("a", "b"))
    assert [pair.prompt for pair in read(path)] == [[user("a")], [user("b")]]
    assert [pair.prompt for pair in read(path, "test")] == [[user("b")]]
    assert (identity(path)["split"], identity(path, "test")["split"]) == ("train", "test")


@pytest.mark.parametrize("write", WRITERS)
def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path, write):
    rows = [*texts("a", "b"), {"prompt": "broken", "chosen": None, "rejected": None}]
    path = write(tmp_path / "data", rows)
    for limit in (0, 1, 2):
        assert [pair.row for pair in read(path, limit=limit)] == list(range(limit))
    with pytest.raises(UserError):
        read(path, limit=3)


def test_a_limit_above_the_rows_changes_nothing(tmp_path):
    assert len(read(write_jsonl(tmp_path / "data", texts("a", "b")), limit=9)) == 2


@pytest.mark.parametrize("write", WRITERS)
def test_identity(tmp_path, write):
    path = write(tmp_path / "data", texts("a", "b"))
    other = write(tmp_path / "other", texts("a", "c"))
    first = identity(path, limit=1)
    assert first == identity(path, limit=1)
    assert first["source"] == str(path)
    assert first["revision"] is None
    assert (first["limit"], identity(path)["limit"]) == (1, None)
    assert first["fingerprint"] != identity(other)["fingerprint"]


@pytest.mark.parametrize("write", [write_json, write_jsonl, write_parquet])
def test_a_file_is_identified_by_its_bytes_and_has_no_split(tmp_path, write):
    one, same = (write(tmp_path / name, texts("a")) for name in ("one", "same"))
    assert identity(one)["fingerprint"] == identity(same)["fingerprint"]
    assert identity(one, "test")["split"] is None


WRONG_ROWS = [
    ({"prompt": "q", "rejected": "b"}, "missing field", "chosen"),
    ({"prompt": "q", "chosen": "a"}, "missing field", "rejected"),
    ({"chosen": "a", "rejected": "b"}, "missing field", "prompt"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "null field", "chosen"),
    ({"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}, "wrong type", "rejected is not"),
    ({"prompt": "q", "chosen": [assistant("a")], "rejected": "b"}, "wrong type", "rejected is not"),
    ({"prompt": "q", "chosen": 1, "rejected": 2}, "wrong type", "must be a list"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "wrong type", "must be a list"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty messages", ""),
    ({"prompt": "q", "chosen": [], "rejected": []}, "empty messages", ""),
    ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, "wrong type", "an object with role"),
    ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "missing field", "content"),
    ({"prompt": [user(None)], "chosen": "a", "rejected": "b"}, "wrong type", "must be text"),
    ({"chosen": [ASK, user("a")], "rejected": [ASK, user("b")]}, "wrong role", "assistant"),
    (
        {"chosen": [ASK, assistant("a")], "rejected": [user("r"), assistant("b")]},
        "different prompts",
        "differ",
    ),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "empty prompt", ""),
    ({"prompt": " \n", "chosen": "a", "rejected": "b"}, "empty prompt", ""),
    ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty response", "chosen"),
    ({"prompt": "q", "chosen": "a", "rejected": " \t\u00a0"}, "empty response", ""),
    (
        {"prompt": TALK, "chosen": [ASK, assistant("a")], "rejected": [assistant("b")]},
        "not one answer",
        "one answer",
    ),
    ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "wrong role", "assistant"),
    ({"prompt": "q", "completion": "a", "label": True}, "one answer", "KTO"),
    ({"input": "q", "generations": ["a", "b"], "ratings": [3, 3]}, "equal scores", "all are 3"),
    ({"input": "q", "generations": ["a", "b"], "ratings": [3]}, "too few scores", "1 ratings of 2"),
    ({"input": "q", "responses": ["a", "b"], "scores": [3, None]}, "too few scores", "1 of 2"),
    (
        {"instruction": "q", "completions": [{"response": "a", "overall_score": float("nan")}]},
        "too few scores",
        "0 of 1",
    ),
    (
        {"conversations": [said("narrator", "q")], "chosen": "a", "rejected": "b"},
        "unknown speaker",
        "narrator",
    ),
    (
        {"conversations": [said("human", "q"), said("gpt", "a")], "chosen": "a", "rejected": "b"},
        "not one answer",
        "ends with an answer",
    ),
    (
        {"instruction": "q", "history": [["a"]], "chosen": "a", "rejected": "b"},
        "wrong type",
        "hist",
    ),
    (
        {"conversations": [said("human", 1)], "chosen": said("gpt", "a"), "rejected": "b"},
        "wrong type",
        "",
    ),
    (["q", "a", "b"], "not an object", "list"),
    ("q", "not an object", "str"),
    (None, "not an object", "NoneType"),
]


@pytest.mark.parametrize(("row", "reason", "detail"), WRONG_ROWS)
def test_a_wrong_row_is_dropped_or_reported_with_its_place(tmp_path, row, reason, detail):
    rows = [*texts("a"), row, *texts("b")]
    lines, listed = write_jsonl(tmp_path / "data", rows), write_json(tmp_path / "data", rows)
    for path, place in ((lines, "line 4"), (listed, "row 1")):
        # The rows are on lines 2, 4 and 6, between blank ones.
        said = refusal(path)
        assert said.startswith(f"{path}, {place}: {reason}") and detail in said
        dropped = DroppedRows()
        assert [pair.row for pair in read(path, dropped=dropped)] == [0, 2]
        assert dropped.read == 3 and dropped.counts == {reason: 1}
        (record,) = map(json.loads, dropped.listed().splitlines())
        assert record["row"] == 1 and record["place"] == f"{path}, {place}"
        assert record["reason"] == reason and detail in record["detail"]


def test_half_a_character_is_dropped(tmp_path):
    """A lone surrogate cannot be encoded, and no tokeniser accepts it."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}\n')
    assert "lone surrogate" in refusal(path)


ODD = [
    "\x00\x07 bell",
    "\u202eright to left \u05d0\u05d1",
    "e\u0301\u200d\u200b",
    "x" * 10**6,
    "\x1b[31m",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_are_kept_as_they_are(tmp_path, text):
    rows = [{"prompt": text, "chosen": text + "a", "rejected": text + "b"}]
    (pair,) = read(write_jsonl(tmp_path / "data", rows))
    assert pair == Pair([user(text)], text + "a", text + "b", 0)


def test_broken_lines_in_the_middle_are_dropped(tmp_path):
    path = tmp_path / "data.jsonl"
    good = [json.dumps(row).encode() for row in texts("a", "b", "c")]
    deep = b"[" * 100_000
    path.write_bytes(b"\n".join([good[0], good[1][:9], good[1], b"\xff{}", deep, good[2]]))
    dropped = DroppedRows()
    assert [pair.prompt for pair in read(path, dropped=dropped)] == [[user(t)] for t in "abc"]
    assert dropped.counts == {"broken line": 3} and dropped.read == 6


def test_at_most_a_thousand_rows_are_listed_for_each_reason():
    dropped = DroppedRows()
    for row in range(1500):
        dropped.add("empty prompt", row, f"row {row}")
    dropped.add("null field", 1500, "row 1500", "chosen")
    lines = [json.loads(line) for line in dropped.listed().splitlines()]
    assert len(lines) == 1001 and lines[-1]["row"] == 1500
    assert str(dropped) == "1,500 empty prompt, 1 null field"
    assert DroppedRows().listed() == ""


@pytest.mark.parametrize("write", [write_parquet, write_dataset, write_splits])
def test_a_wrong_row_of_a_table_is_reported_with_its_number(tmp_path, write):
    path = write(tmp_path / "data", [*texts("a"), {"prompt": "q", "chosen": "a", "rejected": None}])
    assert refusal(path).startswith(f"{path}, row 1: null field, rejected")


# File name, its bytes, the message after the path.
WRONG_FILES = [
    (
        "a.jsonl",
        b'{"prompt":"q","chosen":"a","rejected":"b"}\n{"prompt": \n{}\n',
        ", line 2: broken line",
    ),
    (
        "a.jsonl",
        b'{"prompt":"q","chosen":"a","rejected":"b"}\n\n"\xff"\n',
        ", line 3: broken line, 'utf-8'",
    ),
    ("a.json", b'[{"prompt":"q","chosen":"a","rejected":"b"},\n{"prompt"]', ", line 2: "),
    ("a.json", b'{"prompt":"q","chosen":"a","rejected":"b"}', " is not a JSON list"),
    ("a.json", b'["\xff"]', ", line 1: not valid UTF-8"),
    ("a.json", b"", ", line 1: "),
    ("a.parquet", b"PAR1 and no more", " is not readable Parquet"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG_FILES)
def test_a_data_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{said}")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_missing_data_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"gone.{suffix}"
    assert refusal(path) == f"the data file {path} does not exist"


def test_an_unknown_split_is_refused(tmp_path):
    path = write_splits(tmp_path / "data", texts("a"))
    with pytest.raises(UserError, match="has no split validation") as caught:
        read(path, "validation")
    assert str(path) in caught.value.message
    assert caught.value.hint == "it has train, test"


def test_a_folder_without_a_data_set_is_refused(tmp_path):
    write_jsonl(tmp_path / "data", texts("a"))
    assert refusal(tmp_path).startswith(f"the folder {tmp_path} is not a data set")


def test_the_examples_of_the_page_are_the_same_pair():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.S)]
    assert len(rows) == 11
    with_tools = [row for row in rows if "tools" in row]
    for row in rows:
        if row in with_tools:
            continue
        pair = parse_row(row, 0, "")
        assert [m for m in pair.prompt if m["role"] != "system"] == [user("Name a colour.")]
        assert (pair.chosen, pair.rejected) == ("Blue.", "Seven.")
    (row,) = with_tools
    pair = parse_row(row, 0, "")
    assert pair.tools == row["tools"] and [pair.chosen] == row["chosen"]


@pytest.mark.parametrize(("margin", "rows"), [(0.0, [0, 1, 2]), (1.5, [1, 2]), (9.0, [])])
def test_answers_whose_scores_are_too_close_are_dropped(tmp_path, margin, rows):
    answers = {"instruction": "q", "generations": ["a", "b", "c"]}
    path = write_jsonl(
        tmp_path / "data",
        [answers | {"ratings": list(scores)} for scores in ((5, 4, 4.5), (1, 2.5, 2), (9, 1, 1))],
    )
    dropped = DroppedRows()
    source = open_source(str(path), None, None, score_margin=margin)
    pairs = list(read_pairs(source, dropped))
    assert [pair.row for pair in pairs] == rows
    assert dropped.counts == ({"scores too close": 3 - len(rows)} if len(rows) < 3 else {})
    # The first of equal ones.
    sides = {0: ("a", "b"), 1: ("b", "a"), 2: ("a", "b")}
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [sides[row] for row in rows]
    # Stores that were made before have no such entry.
    assert source.identity.get("score_margin", 0.0) == margin


def test_equal_pairs_are_kept_once_on_request(tmp_path):
    """Whatever their layouts."""
    rows = [*texts("a", "b", "a"), {"instruction": "a", "output": [GOOD, BAD]}]
    rows.append({"prompt": "a", "chosen": BAD, "rejected": GOOD})
    path = write_jsonl(tmp_path / "data", rows)
    assert len(read(path)) == 5
    source, dropped = open_source(str(path), None, None, deduplicate=True), DroppedRows()
    assert [pair.row for pair in read_pairs(source, dropped)] == [0, 1, 4]
    assert dropped.counts == {"duplicate": 2}
    assert source.identity["deduplicate"] is True


@pytest.mark.parametrize("name", ["text", "messages", "implicit prompt", "UltraFeedback"])
def test_a_column_system_begins_the_prompt(tmp_path, name):
    row, prompt = LAYOUTS[name]
    if prompt == TALK:
        prompt = TALK[1:]
        row = {
            key: [message for message in value if message["role"] != "system"]
            for key, value in row.items()
        }
    path = write_jsonl(tmp_path / "data", [row | {"system": "Be brief."}])
    assert read(path) == [Pair([TALK[0], *prompt], GOOD, BAD, 0)]


def test_a_system_message_is_not_doubled(tmp_path):
    row = {"prompt": TALK, "chosen": GOOD, "rejected": BAD, "system": "Be another."}
    assert read(write_jsonl(tmp_path / "data", [row])) == [Pair(TALK, GOOD, BAD, 0)]


def test_splits_of_a_folder_of_parquet(tmp_path):
    path = write_parquet_folder(tmp_path / "set", texts("a", "b", "c"))
    assert [pair.prompt for pair in read(path, "test")] == [[user("c")]]
    assert (identity(path)["split"], identity(path, "test")["split"]) == ("train", "test")
    assert "has no Parquet files of the split dev" in refusal(path, "dev")
    before = identity(path)["fingerprint"]
    (path / "data/train-00000-of-00002.parquet").rename(path / "data/train-00002-of-00002.parquet")
    assert identity(path)["fingerprint"] != before
    # Names that say nothing of splits.
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        write_parquet(other / f"part{number}", texts(str(number)))
    assert [pair.prompt for pair in read(other)] == [[user(str(number))] for number in range(3)]
    assert identity(other)["split"] is None


def test_revision_and_configuration_of_a_data_set_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return datasets.Dataset.from_list(texts("a"), split="train")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/name@v1.2", None, None, config_name="small")
    assert asked == [(("owner/name", "small"), {"split": "train", "revision": "v1.2"})]
    assert source.identity["source"] == "owner/name@v1.2"
    assert source.identity["config_name"] == "small"
    assert [pair.prompt for pair in read_pairs(source, DroppedRows())] == [[user("a")]]


@pytest.mark.parametrize("write", [write_gz, write_zst])
def test_a_damaged_compressed_file_is_refused(tmp_path, write):
    path = write(tmp_path / "data", texts("a", "b"))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(content)
        assert "cannot be decompressed" in refusal(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,chosen,rejected\nq,a,b\nq,a,b,c\n", "line 3: broken line, it has more cells"),
        ("prompt,chosen,rejected\nq,a,b\nq,a\n", "line 3: null field, rejected"),
        ('prompt,chosen,rejected\nq,a,"b\n', "after line 1: unexpected end of data"),
        (
            "prompt,chosen,rejected\nq,\"[{'role': 'assistant'}]\",b\n",
            "line 2: wrong type, chosen is no JSON",
        ),
        ("prompt,chosen,rejected\nq,\ud800,b\n", "is not valid UTF-8"),
        ("", "the data have no rows"),
    ],
)
def test_a_broken_table_is_reported_with_its_place(tmp_path, text, reason):
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        require_a_pair([open_source(str(path), None, None)], strict=True)
        read(path)
    assert reason in caught.value.message


def test_json_in_the_answers_of_a_table_stays_text(tmp_path):
    answer = '{"role": "x"}'
    path = write_csv(tmp_path / "data", [{"prompt": "q", "chosen": answer, "rejected": "[1]"}])
    assert read(path) == [Pair([user("q")], answer, "[1]", 0)]


# -- mistakes that are found before anything expensive is done -----------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.parquet.gz", "a.tsv", "a.jsonl.bz2"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"prompt,chosen,rejected")
    with pytest.raises(UserError, match=r"is not one of \.jsonl, \.json, \.csv, \.parquet"):
        open_source(str(path), None, None)


OTHER_LAYOUTS = {
    "Alpaca": ({"instruction": "q", "input": "", "output": "a"}, "output: text", "Alpaca"),
    "KTO": ({"prompt": "q", "completion": "a", "label": True}, "as for KTO", ""),
    "KTO of LLaMA-Factory": (
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
        "as for KTO",
        "",
    ),
    "pictures": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["1.jpg"]},
        "column images",
        "",
    ),
    "one conversation": (
        {"messages": [{"role": "user", "content": "q"}]},
        "messages: list of object with role, content",
        "two conversations, chosen and rejected",
    ),
    "other names": (
        {"question": "q", "good": "a", "bad": "b"},
        "good: text",
        "chosen and rejected",
    ),
    "wrong messages": (
        {"prompt": "q", "chosen": [{"text": "a"}], "rejected": [{"text": "b"}]},
        "chosen: list of object with text",
        "role and content",
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_data_of_another_layout_name_the_first_row_and_the_nearest_layout(tmp_path, layout, strict):
    row, found, nearest = OTHER_LAYOUTS[layout]
    path = write_jsonl(tmp_path / "data", [row] * 3)
    with pytest.raises(UserError) as caught:
        require_a_pair([open_source(str(path), None, None)], strict)
    # The file begins with a blank line.
    assert f"{path}, line 2: " in caught.value.message
    assert found in caught.value.message
    assert nearest in caught.value.hint
    assert strict or "no pair is left of 3 rows: 3 " in caught.value.message


def test_one_pair_among_other_rows_is_enough(tmp_path):
    path = write_jsonl(tmp_path / "data", [{"messages": []}, *texts("a")])
    require_a_pair([open_source(str(path), None, None)], False)
    with pytest.raises(UserError, match="line 2: missing field, chosen"):
        require_a_pair([open_source(str(path), None, None)], True)


def test_empty_tool_fields_are_ignored(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "q", "tool_calls": None}],
        "chosen": [{"role": "assistant", "content": "a", "tool_calls": []}],
        "rejected": [{"role": "assistant", "content": "b", "function_call": None}],
        "tools": [],
    }
    assert len(read(write_jsonl(tmp_path / "data", [row]))) == 1
