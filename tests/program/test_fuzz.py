"""Random and damaged files and flags: each is read as it is meant, or refused with an error.

Every target writes an input and reads it with the product. It must not raise anything but a
UserError, hang, or give another result than a naive reader. `pytest -m long` tries many more.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import math
import re
import signal
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
import yaml
from hub_cache import write_scope
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from fpocli.caching.imported import ImportedReference
from fpocli.cli.commands import app
from fpocli.config import CacheConfig, EvalConfig, TrainConfig
from fpocli.data.dropped import DroppedRows
from fpocli.data.layouts import read_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import open_source
from fpocli.data.token_rows import read_token_pairs
from fpocli.features.pretrained import load_encoder
from fpocli.features.weights import load_feature_weights
from fpocli.model.language_model import load_model
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model

# Hypothesis would print inputs, some of which are whole files.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
CPU = torch.device("cpu")
PAIR = {"prompt": "the cat", "chosen": "sat <eos>", "rejected": "on"}
# Seconds of processor time after which an input counts as a hang.
_ENDLESS = 20


class Endless(BaseException):
    """Raised at a hang; not an Exception, so that the tested code cannot catch it."""


@contextlib.contextmanager
def limited():
    """Stop after so much processor time, however busy the machine is."""

    def stop(*_):
        raise Endless

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _ENDLESS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attempt(call, *arguments):
    """The result of a call; None if it raises a UserError."""
    try:
        with limited():
            return call(*arguments)
    except UserError as error:
        assert error.message
        assert error.message.isprintable()
        assert "Traceback" not in error.message
        return None


# -- inputs ----------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from([
        "", " ", "\0", "\ud800", "\u202eabc\u202c", "é" * 5000, "<eos>", "\n\nHuman: x",
        "\n\nHuman: Hi\n\nAssistant: a", "\n\nHuman: Hi\n\nAssistant:b", "\x1b[2J",
        "\ufeff", "\x85", "true", "1e999", "../x", "/etc/passwd", "~", "user", "assistant", "inf",
        "nan", "٣", "auto",
    ]),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([10**4, 2**31, 2**63, 10**18, 10**400, -(2**63), 0.5, 1e308, math.nan]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw, value):
    """A JSON value with some of its parts replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        part = value
        for _ in range(draw(st.integers(0, 3))):
            inner = list(part.values()) if isinstance(part, dict) else part
            inner = [item for item in inner if isinstance(item, (dict, list)) and item]
            if not inner:
                break
            part = draw(st.sampled_from(inner))
        keys = sorted(part, key=str) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return draw(VALUES)
        key = draw(st.sampled_from(keys))
        change = draw(st.integers(0, 5))
        if change == 0:
            del part[key]
        elif change == 1 and isinstance(part, dict):
            part[draw(TEXTS)] = part[key]
        elif change == 2 and isinstance(part, list):
            part.append(part[key])
        elif change == 3 and type(part[key]) is int:
            part[key] = draw(st.sampled_from([0, -1, part[key] + 1, part[key] * 2, 10**12]))
        else:
            part[key] = draw(VALUES)
    return value


@st.composite
def spoilt(draw, whole, most=4):
    """Bytes with some of them changed, cut out or put in."""
    whole = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(len(whole) - 1, 0)))
        change = draw(st.integers(0, 4))
        if change == 0:
            del whole[place:]
        elif change == 1:
            del whole[place : place + draw(st.integers(1, 9))]
        elif change == 2:
            whole[place:place] = draw(st.binary(max_size=9))
        elif whole:
            place = min(place, len(whole) - 1)
            whole[place] = draw(st.integers(0, 255))
    return bytes(whole)


# -- data files ------------------------------------------------------------------------------------


def says(role, content):
    return {"role": role, "content": content}


ROWS = [
    {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    {"prompt": [says("user", "Hi")], "chosen": [says("assistant", "a")],
     "rejected": [says("assistant", "b")]},
    {"prompt": "Hi", "chosen": [says("user", "Hi"), says("assistant", "a")],
     "rejected": [says("user", "Hi"), says("assistant", "b")]},
    {"chosen": [says("user", "Hi"), says("assistant", "a")],
     "rejected": [says("user", "Hi"), says("assistant", "b")]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    {"prompt": [says("system", "x"), says("user", "Hi")], "chosen": "a", "rejected": "b"},
]  # fmt: skip
DEEP = ["[" * 10**5, "[" * 10**5 + "]" * 10**5, '{"a":' * 10**5, "9" * 5000, "-", "NaN", "1e999"]


def naive(row):
    """A row, read as docs/data.md describes: prompt as (role, text), chosen and rejected. None for
    a row that is no pair."""

    def talk(value):
        if not isinstance(value, list) or not value:
            return None
        found = []
        for item in value:
            turn = (item.get("role"), item.get("content")) if isinstance(item, dict) else ()
            if len(turn) < 2 or not all(isinstance(part, str) for part in turn):
                return None
            found.append(turn)
        return found

    def transcript(text):
        found, names = [], ("\n\nHuman:", "\n\nAssistant:")
        marks = [place for place in range(len(text)) if text.startswith(names, place)]
        if not marks or text[: marks[0]].strip():
            return None
        for place, end in zip(marks, [*marks[1:], len(text)], strict=True):
            name, _, said = text[place + 2 : end].partition(":")
            said = said[1:] if said[:1] == " " else said
            found.append(({"Human": "user", "Assistant": "assistant"}[name], said))
        return found

    if not isinstance(row, dict):
        return None
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    texts = [isinstance(side, str) for side in sides]
    if texts[0] != texts[1]:
        return None
    if texts[0] and prompt is not None:
        head = [("user", prompt)] if isinstance(prompt, str) else talk(prompt)
        talks = [[("assistant", side)] for side in sides]
    else:
        talks = [transcript(side) if texts[0] else talk(side) for side in sides]
        if None in talks:
            return None
        if isinstance(prompt, list):
            head = talk(prompt)
        elif isinstance(prompt, str) and len(talks[0]) == len(talks[1]) == 1:
            head = [("user", prompt)]
        else:
            head = talks[0][:-1]
            if talks[1][:-1] != head:
                return None
            talks = [side[-1:] for side in talks]
        if head is None:
            return None
        talks = [side[len(head) :] if side[: len(head)] == head else side for side in talks]
    if head is None or [len(side) for side in talks] != [1, 1]:
        return None
    (one_role, one), (other_role, other) = talks[0][0], talks[1][0]
    everything = "".join(said for _, said in [*head, *talks[0], *talks[1]])
    whole = not re.search("[\ud800-\udfff]", everything)
    has_text = any(said.strip() for _, said in head) and one.strip() and other.strip()
    if not whole or not has_text or {one_role, other_role} != {"assistant"}:
        return None
    return head, one, other


def kept(path):
    """What the product reads: (row, prompt, chosen, rejected), and how many rows there are."""
    dropped = DroppedRows()
    pairs = [
        (
            pair.row,
            [(turn["role"], turn["content"]) for turn in pair.prompt],
            pair.chosen,
            pair.rejected,
        )
        for pair in read_pairs(open_source(str(path), None, None), dropped)
    ]
    assert dropped.read == len(pairs) + dropped.counts.total()
    return pairs


def expected(rows):
    found = ((number, naive(row)) for number, row in enumerate(rows))
    return [(number, *pair) for number, pair in found if pair is not None]


SOME_ROWS = st.lists(
    st.one_of(st.sampled_from(ROWS), st.sampled_from(ROWS).flatmap(edited), VALUES), max_size=4
)
CODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])


@st.composite
def jsonl(draw):
    rows = draw(SOME_ROWS)
    ascii_only = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if draw(st.integers(0, 5)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(DEEP)))
    end = draw(st.sampled_from(["\n", "\r\n", "\n \n", "\r"]))
    content = end.join(lines).encode(draw(CODINGS), "replace")
    return draw(spoilt(content)) if draw(st.booleans()) else content


def check_jsonl(folder, content):
    file = folder / "data.jsonl"
    file.write_bytes(content)
    rows = []
    for line in content.split(b"\n"):
        if line.strip():
            try:
                rows.append(json.loads(line.decode("utf-8").removeprefix("\ufeff")))
            except (ValueError, RecursionError):
                rows.append(None)
    assert attempt(kept, file) == expected(rows)


@st.composite
def json_file(draw):
    value = draw(SOME_ROWS | VALUES)
    text = json.dumps(
        value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    if draw(st.integers(0, 5)) == 0:
        text = text.replace("null", draw(st.sampled_from(DEEP))) + draw(
            st.sampled_from(["", *DEEP])
        )
    content = text.encode(draw(CODINGS), "replace")
    return draw(spoilt(content)) if draw(st.booleans()) else content


def check_json(folder, content):
    file = folder / "data.json"
    file.write_bytes(content)
    try:
        rows = json.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        rows = None
    assert attempt(kept, file) == (expected(rows) if isinstance(rows, list) else None)


@st.composite
def parquet(draw):
    shape = draw(st.sampled_from(ROWS))
    columns = {name: [row.get(name) for row in [shape] * 3] for name in shape}
    for name in draw(st.sets(st.sampled_from(["chosen", "rejected", "prompt", "more"]))):
        kind = draw(st.sampled_from(["text", "number", "bytes", "date", "null", "lists", "gone"]))
        columns[name] = {
            "text": ["a", draw(TEXTS), None],
            "number": [1, None, 3],
            "bytes": [b"\xff", b"", None],
            "date": pyarrow.array([2**62, 0, -(2**62)], pyarrow.timestamp("us")),
            "null": [None] * 3,
            "lists": [[says("assistant", "a")], [], None],
            "gone": None,
        }[kind]
        if columns[name] is None:
            del columns[name]
    columns = columns or {"more": [1]}
    with contextlib.suppress(pyarrow.ArrowException, UnicodeError):
        table = pyarrow.table({name: pyarrow.array(value) for name, value in columns.items()})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(
            table, sink, compression=draw(st.sampled_from(["none", "zstd"]))
        )
        content = sink.getvalue().to_pybytes()
        return (table, content) if draw(st.booleans()) else (None, draw(spoilt(content)))
    return None, draw(st.binary(max_size=50))


def check_parquet(folder, given):
    table, content = given
    check_rows(folder / "data.parquet", content, None if table is None else table.to_pylist)


def check_rows(file, content, rows):
    """What is read of a file whose rows are known, if `rows` returns them, is what they hold."""
    file.write_bytes(content)
    found = attempt(kept, file)
    if rows is not None and found is not None:
        assert found == expected(rows())


OTHER_ROWS = [
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}, "system": "x"},
    {"messages": [says("user", "Hi")], "chosen": says("assistant", "a"),
     "rejected": says("assistant", "b")},
    {"instruction": "Hi", "input": "you", "output": ["a", "b"], "history": [["c", "d"]]},
    {"system": "x", "question": "Hi", "chosen": "a", "rejected": "b"},
    {"instruction": "Hi", "completions": [{"response": "a", "overall_score": 2.0},
                                          {"response": "b", "overall_score": 1}]},
    {"input": "Hi", "generations": ["a", "b", "c"], "ratings": [3, 1, 2.5]},
    {"prompt": "Hi", "completion": "a", "label": True},
]  # fmt: skip


def texts_in(value):
    """Every text of a JSON value."""
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from texts_in(item)


@st.composite
def other_layouts(draw):
    row = st.sampled_from(OTHER_ROWS)
    return draw(st.lists(row | row.flatmap(edited), min_size=1, max_size=4))


def check_other_layouts(folder, rows):
    """Nothing is made up: every text of a pair is one of the row, or two of them on two lines."""
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, prompt, chosen, rejected in attempt(kept, file) or ():
        texts = set(texts_in(rows[number]))
        texts |= {f"{one}\n{other}" for one in texts for other in texts}
        assert {chosen, rejected, *(said for _, said in prompt)} <= texts
        assert {role for role, _ in prompt} <= {"user", "assistant", "system"} | texts


@st.composite
def table(draw):
    rows = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(PAIR, TEXTS)), max_size=3))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(PAIR))
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8", "surrogatepass")
    return (None, draw(spoilt(content))) if draw(st.booleans()) else (rows, content)


def check_table(folder, given):
    rows, content = given
    check_rows(folder / "data.csv", content, None if rows is None else lambda: rows)


@st.composite
def compressed(draw):
    content = draw(jsonl())
    sink = pyarrow.BufferOutputStream()
    kind = draw(st.sampled_from(["gz", "zst"]))
    with pyarrow.CompressedOutputStream(sink, {"gz": "gzip", "zst": "zstd"}[kind]) as stream:
        stream.write(content)
    packed = sink.getvalue().to_pybytes()
    return (kind, None, draw(spoilt(packed))) if draw(st.booleans()) else (kind, content, packed)


def check_compressed(folder, given):
    kind, content, packed = given
    file, plain = folder / f"data.jsonl.{kind}", folder / "data.jsonl"
    file.write_bytes(packed)
    found = attempt(kept, file)
    if content is not None:
        plain.write_bytes(content)
        assert found == attempt(kept, plain)


# -- flags and YAML files --------------------------------------------------------------------------

CONFIGS = {"cache": CacheConfig, "train": TrainConfig, "eval": EvalConfig}
WORDS = TEXTS.filter(lambda text: "\0" not in text and not re.search("[\ud800-\udfff]", text))


def fields(config):
    return [field.name for field in dataclasses.fields(config)]


@st.composite
def flags(draw):
    command = draw(st.sampled_from(sorted(CONFIGS)))
    names = draw(st.lists(st.sampled_from(fields(CONFIGS[command])), max_size=4))
    values = WORDS | NUMBERS.map(str)
    words = [word for name in names for word in ("--" + name.replace("_", "-"), draw(values))]
    return [command, "--cache=s", "--model=m", "--layer=1", *words][: None if names else 2]


@st.composite
def flag_file(draw):
    command = draw(st.sampled_from(sorted(CONFIGS)))
    names = st.sampled_from([*fields(CONFIGS[command]), "preset", "config", "help"]) | TEXTS
    values = st.dictionaries(names, VALUES, max_size=5)
    return command, draw(as_text(values))


BOMBS = [
    "a: &a [*a]", "!!int ''", "!!bool x", "!!timestamp x", "2001-99-99", "!!float x",
    "? {a: b}\n: c", "[" * 5000, "{" * 5000, "!!python/object:os.system x", "9" * 5000,
    "a: !!binary é", "<<: 1", "%YAML 9", "1:" * 50, "&a", "*a", "!!set {a, b}", "!!omap [a: 1]",
    "\ufeffa: 1", "0x", "._", "=", "---\n---",
]  # fmt: skip


@st.composite
def as_text(draw, values):
    """YAML or JSON of a value as bytes, sometimes with an odd construct in it."""
    value = draw(values)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        text = json.dumps(value)
    else:
        text = yaml.safe_dump(value, allow_unicode=draw(st.booleans()))
    if kind == 1:
        text = draw(st.sampled_from([text, ""])) + draw(st.sampled_from(BOMBS))
    content = text.encode("utf-8", "surrogatepass")
    return draw(spoilt(content)) if kind == 2 else content


def invoke(words):
    """Parses a command line without running the command."""
    taken = []
    with pytest.MonkeyPatch.context() as patch, limited():
        for name in ("cache", "train", "evaluate"):
            patch.setattr(f"fpocli.{name}", taken.append)
        # It would replace this process.
        patch.setattr("fpocli.cli.commands.launch", lambda number, device: None)
        result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 2), (result.exception, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if "--help" not in words and result.exit_code == 0:
        (config,) = taken
        # What was accepted must be accepted again: every field has its type and is in its range.
        assert type(config)(**dataclasses.asdict(config)) == config
        assert not config.trust_remote_code or "--trust-remote-code" in words


def check_flags(folder, words):
    invoke(words)


def check_flag_file(folder, given):
    command, content = given
    file = folder / "flags.yaml"
    file.write_bytes(content)
    invoke([command, *(["m"] if command == "eval" else []), "--config", str(file)])


GRID = {
    "cache": {"model": "m", "layer": [1], "sae": ["a/b"]},
    "train": {"preset": "paper-2b", "epochs": 1},
    "eval": {"k": 3},
    "runs": [{"method": ["dpo", "fpo"], "seed": [0, 1]}, {"method": "fpo", "layer": [[7], [9]]}],
    "reports": ["table3"],
    "launch": "a 'b'",
}


def check_grid(folder, content):
    """Only the plan, so nothing is started."""
    file = folder / "grid.yaml"
    file.write_bytes(content)
    with contextlib.chdir(folder), limited():
        result = CliRunner().invoke(app, ["compare", "--plan", str(file)])
    assert result.exit_code in (0, 2), (result.exception, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not [path for path in folder.iterdir() if path != file]


SITES = {"layer_1.mlp_out": 12, "layer_2.mlp_out": 7}
WEIGHTS = {
    "layer_1.mlp_out": {
        "default": 0.5,
        1: 2,
        "3": {"weight": 0.0, "direction": "up"},
        "groups": {"some": [1, 4], "more": {"features": [7], "weight": 2.5}},
    },
    "layer_2.mlp_out": {"6": 1e3},
}


def check_weights(folder, content):
    file = folder / "weights.yaml"
    file.write_bytes(content)
    found = attempt(load_feature_weights, str(file), SITES)
    if found is None:
        return
    given = yaml.safe_load(content.decode())
    assert found.keys() == given.keys() <= SITES.keys()
    for site, weights in found.items():
        assert weights.weight.isfinite().all() and (weights.weight >= 0).all()
        assert set(weights.direction.tolist()) <= {-1, 0, 1}
        own = {int(str(name)): value for name, value in given[site].items()
               if name not in ("default", "groups")}  # fmt: skip
        groups = weights.groups.values()
        named = {*own, *(int(feature) for features in groups for feature in features)}
        assert weights.named.tolist() == sorted(named) and max(named, default=0) < SITES[site]
        for index, value in own.items():
            if not isinstance(value, dict):
                assert weights.weight[index].item() == np.float32(value)


# -- SAEs and models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    tiny.sae_folder(folder / "sae")
    tiny.model_folder(folder / "model")
    write_scope(folder / "params.npz", tiny.WIDTH, tiny.FEATURES, np.float32, threshold=1.5)
    return folder


def npz(originals):
    return spoilt((originals / "params.npz").read_bytes()) | st.binary(max_size=50)


def check_npz(folder, content, originals):
    file = folder / "params.npz"
    file.write_bytes(content)
    found = attempt(load_encoder, str(file), CPU)
    # An archive has checksums: what loads is what was written.
    if found is not None:
        assert found.hash() == load_encoder(str(originals / "params.npz"), CPU).hash()


def sae(originals):
    weights = (originals / "sae/sae_weights.safetensors").read_bytes()
    config = (originals / "sae/cfg.json").read_bytes()
    changed = edited(json.loads(config)).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        st.tuples(spoilt(weights), st.just(config)),
        st.tuples(spoilt(weights[:800]).map(lambda head: head + weights[800:]), st.just(config)),
        st.tuples(st.just(weights), spoilt(config)),
        st.tuples(st.just(weights), changed),
    )


def check_sae(folder, given, originals):
    weights, config = given
    (folder / "cfg.json").write_bytes(config)
    (folder / "sae_weights.safetensors").write_bytes(weights)
    found = attempt(load_encoder, str(folder), CPU)
    if found is None:
        return
    assert (found.width, found.features) == (tiny.WIDTH, tiny.FEATURES)
    original = (originals / "sae/sae_weights.safetensors").read_bytes()
    header = original[: 8 + int.from_bytes(original[:8], "little")]
    if weights == original:
        assert found.hash() == load_encoder(str(originals / "sae"), CPU).hash()
    elif not weights.startswith(header):
        # Only a header that means the same, or gives the values to other names of the same shape.
        assert len(weights) - len(original) < 100


def model(originals):
    def parts(name):
        whole = (originals / "model" / name).read_bytes()
        changed = edited(json.loads(whole)).map(lambda value: json.dumps(value).encode())
        return st.tuples(st.just(name), changed | spoilt(whole))

    return st.one_of(parts("config.json"), parts("tokenizer_config.json"), parts("tokenizer.json"))


def check_model(folder, given, originals):
    name, content = given
    for file in (originals / "model").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR))
    if name == "config.json":
        found = attempt(lambda: load_model(find_model(str(folder)), [], torch.float32, CPU))
        if found is not None:
            state = load_file(originals / "model/model.safetensors")
            for key, value in found.network.named_parameters():
                assert torch.equal(value, state[key]), key
    attempt(lambda: tokenise(folder))


def tokenise(folder):
    tokenizer = PairTokenizer(find_model(str(folder)), "halos", 64, 32, DroppedRows())
    pairs = read_pairs(open_source(str(folder / "pairs.jsonl"), None, None), DroppedRows())
    return list(tokenizer(pairs))


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": ["<eos>"]}}}
TOOL_ROW = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "prompt": [
        says("user", "Hi"),
        says("assistant", "so") | {"tool_calls": [CALL, CALL]},
        says("tool", "2") | {"name": "f", "tool_call_id": "a"},
    ],
    "chosen": [says("assistant", "") | {"tool_calls": [CALL]}],
    "rejected": [says("assistant", "no <eos>")],
}
TEXT_ROW = {
    "tools": json.dumps(TOOL_ROW["tools"]),
    "conversations": [{"from": "human", "value": "Hi"},
                      {"from": "function_call", "value": json.dumps(CALL["function"])},
                      {"from": "observation", "value": "2"}],
    "chosen": {"from": "function_call", "value": json.dumps([CALL["function"]])},
    "rejected": {"from": "gpt", "value": "no"},
}  # fmt: skip
# Renders everything; raises for anything that is not as layouts.py makes it.
TOOL_TEMPLATE = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name + (t | tojson) }}{% endfor %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant' }}{% endif %}"
)


def tool_rows(originals):
    row = st.sampled_from([TOOL_ROW, TEXT_ROW])
    return st.lists(row | row.flatmap(edited), min_size=1, max_size=3)


def check_tool_rows(folder, rows, originals):
    """Each row is a pair or dropped; no token of the data is special, and no call is made up."""
    file, template = folder / "data.jsonl", folder / "template.jinja"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(TOOL_TEMPLATE)
    dropped = DroppedRows()
    tokenizer = PairTokenizer(
        find_model(str(originals / "model")), str(template), 500, 400, dropped
    )
    source = open_source(str(file), None, None)
    pairs = attempt(lambda: list(read_pairs(source, DroppedRows()))) or []
    tokens = attempt(lambda: list(tokenizer(read_pairs(source, dropped))))
    assert tokens is not None and dropped.read == len(tokens) + dropped.counts.total()
    special = {*tokenizer.tokenizer.all_special_ids}
    for pair in tokens:
        for response in (pair.chosen, pair.rejected):
            assert not special & {*response[:-1]}
    for pair in pairs:
        said = set(texts_in(rows[pair.row]))
        # Calls may be JSON text.
        inside = [parsed for text in said for parsed in [json_in(text)] if parsed is not None]
        said |= {text for value in inside for text in texts_in(value)}
        calls = [
            call for message in [*pair.prompt, pair.chosen, pair.rejected]
            if isinstance(message, dict) for call in message.get("tool_calls", [])
        ]  # fmt: skip
        assert {call["function"]["name"] for call in calls} <= said


def json_in(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


TOKEN_ROW = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}


def token_rows(originals):
    return st.lists(st.just(TOKEN_ROW) | edited(TOKEN_ROW), min_size=1, max_size=3)


def check_token_rows(folder, rows, originals):
    """The ids of a row are those of its pair, or the row is dropped."""
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = DroppedRows()
    tokenizer = PairTokenizer(find_model(str(originals / "model")), "halos", 64, 32, dropped)
    source = open_source(str(file), None, None)
    found = attempt(lambda: list(read_token_pairs(source, tokenizer)))
    assert found is not None and dropped.read == len(rows) == len(found) + dropped.counts.total()
    for pair in found:
        parts = (pair.prompt, pair.chosen, pair.rejected)
        kept = {name: part.tolist() for name, part in zip(TOKEN_ROW, parts, strict=True)}
        assert kept == {name: rows[pair.row][name] for name in TOKEN_ROW}


@st.composite
def tensors(draw):
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
    shapes = st.lists(st.integers(0, 4), max_size=2)
    named = {
        name: torch.full(draw(shapes), draw(st.integers(-1, 1))).to(draw(kinds))
        if draw(st.booleans())
        else torch.full((3,), draw(st.floats(width=32)))
        for name in draw(st.sets(st.sampled_from(["chosen_logps", "rejected_logps", "more"])))
    }
    made = io.BytesIO()
    torch.save(draw(st.sampled_from([named, list(named.values()), 3])), made)
    return draw(spoilt(made.getvalue())) if draw(st.booleans()) else made.getvalue()


def check_tensors(folder, content):
    """Values of a file are one number for each row and side, none above 0."""
    file = folder / "logps.pt"
    file.write_bytes(content)
    config = CacheConfig(model="m", data=str(file), reference_logps=str(file))
    found = attempt(ImportedReference, config)
    if found is not None:
        assert found._values.ndim == 2 and found._values.shape[1] == 2
        assert not (found._values > 0).any()


# Target: (inputs, check, number of inputs, number of inputs in the long run). Those of FILES are
# functions of the original files.
TARGETS = {
    "jsonl": (jsonl(), check_jsonl, 60, 2500),
    "json": (json_file(), check_json, 50, 1500),
    "parquet": (parquet(), check_parquet, 40, 1000),
    "other layouts": (other_layouts(), check_other_layouts, 60, 2500),
    "table": (table(), check_table, 40, 1500),
    "compressed": (compressed(), check_compressed, 40, 1000),
    "tensors": (tensors(), check_tensors, 40, 1500),
    "flags": (flags(), check_flags, 40, 1000),
    "flag file": (flag_file(), check_flag_file, 40, 1500),
    "grid": (as_text(st.just(GRID).flatmap(edited) | VALUES), check_grid, 40, 1500),
    "feature weights": (as_text(edited(WEIGHTS) | VALUES), check_weights, 60, 2000),
}
FILES = {
    "npz": (npz, check_npz, 40, 1500),
    "sae": (sae, check_sae, 40, 1500),
    "model": (model, check_model, 30, 1000),
    "tools": (tool_rows, check_tool_rows, 40, 1500),
    "token rows": (token_rows, check_token_rows, 40, 1000),
}


def fuzz(inputs, check, count, **profile):
    """Run a check on `count` inputs, each in an empty folder; returns how many were tried."""
    tried = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        # Without hypothesis's phase "explain", which traces every line.
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **profile,
    )
    @given(inputs)
    def run(value):
        nonlocal tried
        tried += 1
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder), value)

    run()
    return tried


def inputs_of(name, originals):
    if name in TARGETS:
        return TARGETS[name]
    inputs, check, few, many = FILES[name]
    return inputs(originals), functools.partial(check, originals=originals), few, many


@pytest.mark.parametrize("name", [*TARGETS, *FILES])
def test_some_inputs(name, originals):
    """The same inputs each time."""
    inputs, check, few, _ = inputs_of(name, originals)
    assert fuzz(inputs, check, few, derandomize=True) >= few


def npz_of(head):
    """An archive of one array whose header is `head`."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        text = head.encode()
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("W_enc.npy", start + text)
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grid", b"store: s\nruns: [{method: null}]"),
        ("feature weights", b"layer_1.mlp_out: {default: 1" + b"0" * 400 + b"}"),
        ("feature weights", b"layer_1.mlp_out: {1: 1.0e+39}"),
        ("npz", npz_of("{'descr': '<f4',")),
        ("npz", npz_of("(")),
    ],
)
def test_inputs_that_once_failed(name, content, originals, tmp_path):
    """Inputs that once gave a traceback or an infinite weight."""
    _, check, *_ = inputs_of(name, originals)
    check(tmp_path, content)


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", [*TARGETS, *FILES])
def test_many_inputs(name, originals, capsys):
    """Other inputs each time, over 10,000 for all targets together."""
    inputs, check, _, many = inputs_of(name, originals)
    tried = fuzz(inputs, check, many)
    with capsys.disabled():
        print(f"\n{name}: {tried:,} inputs")
