"""Tool definitions, calls and results: rendered by the chat template as transformers and TRL have
it, or the pair is dropped and the reason names what the template leaves out."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
import trl
from tokenizers import AddedToken
from trl.data_utils import apply_chat_template

from fpocli.data.dropped import DroppedRows
from fpocli.data.layouts import parse_row, read_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import BadRow
from fpocli.data.sources import open_source
from fpocli.system.model_folder import ModelFolder

# Templates of well-known models, which come with TRL.
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALLING = ("qwen2_5", "qwen3", "qwen3_6", "llama3_1", "llama3_2", "gemma4", "glm4moe", "gptoss")

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = {"name": "weather", "description": "The weather now.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": ABOUT}]


def call(city, **more):
    function = {"name": "weather", "arguments": {"city": city}}
    return {"type": "function", "function": function} | more


def calling(*cities, text=""):
    calls = [call(city) for city in cities]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASK = user("How warm is it in Paris?")
RESULT = {"role": "tool", "name": "weather", "content": "17 degrees"}
# The prompt ends in a question, or in what a tool returned.
ROWS = {
    "a call is better": {
        "tools": TOOLS, "prompt": [ASK],
        "chosen": [calling("Paris")], "rejected": [assistant("It is warm.")],
    },
    "the wrong call": {
        "tools": TOOLS, "prompt": [user("Hello"), assistant("Hi."), ASK],
        "chosen": [calling("Paris")], "rejected": [calling("Rome")],
    },
    "after a result": {
        "tools": TOOLS, "prompt": [ASK, calling("Paris"), RESULT],
        "chosen": [assistant("17 degrees.")], "rejected": [calling("Rome")],
    },
    "text after a result": {
        "tools": TOOLS, "prompt": [ASK, calling("Paris"), RESULT],
        "chosen": [assistant("17 degrees.")], "rejected": [assistant("No idea.")],
    },
}  # fmt: skip


def tokenizer_of(path, template):
    """A PairTokenizer with one of TRL's templates, or with this text."""
    made = tiny.tokenizer()
    file = TEMPLATES / f"{template}.jinja"
    made.chat_template = file.read_text() if "{" not in template else template
    made.save_pretrained(path)
    return PairTokenizer(ModelFolder(str(path), path, None), None, 5000, 4000, DroppedRows())


def tokenize(path, template, row):
    """The tokens of a row, and what was dropped."""
    tokenizer = tokenizer_of(path, template)
    pairs = list(tokenizer([parse_row(row, 0, "here")]))
    return tokenizer, pairs


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("template", CALLING)
def test_a_pair_is_what_trl_renders(tmp_path, template, name):
    row = ROWS[name]
    tokenizer, pairs = tokenize(tmp_path, template, row)
    (pair,) = pairs
    rendered = apply_chat_template(
        {side: row[side] for side in ("prompt", "chosen", "rejected")},
        tokenizer.tokenizer,
        tools=TOOLS,
    )
    ids = {
        part: tokenizer.tokenizer(text.rstrip(), add_special_tokens=False).input_ids
        for part, text in rendered.items()
        if part != "prompt"
    }
    if name != "text after a result":
        end = tokenizer.end_of_turn
        for side, found in ids.items():
            assert getattr(pair, side) in (found, [*found, *end])
    else:
        assert pair.chosen == [
            *tokenizer.tokenizer("17 degrees.", add_special_tokens=False).input_ids,
            *tokenizer.end_of_turn,
        ]
    plain = tokenizer.tokenizer.apply_chat_template(
        row["prompt"], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer.tokenizer(plain, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos is None or prompt[:1] == [tokenizer.bos] else [tokenizer.bos]
    assert pair.prompt == [*bos, *prompt]
    assert "weather" in plain and not tokenizer.dropped.counts


LEFT_OUT = {
    "llama3": (ROWS["a call is better"], "it leaves out the tools"),
    "phi3": (ROWS["the wrong call"], "it leaves out the tools"),
    "gemma3": (ROWS["after a result"], "Conversation roles must alternate"),
    # Its calls are rendered with no text beside them.
    "llama3_1": (
        ROWS["a call is better"] | {"chosen": [calling("Paris", text="Let me see.")]},
        "it leaves out the text beside a call",
    ),
    "llama3_2": (
        ROWS["a call is better"] | {"chosen": [calling("Paris", "Rome")]},
        "only supports single tool-calls",
    ),
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{{ tools }}": (
        ROWS["text after a result"],
        "it leaves out the calls of tools",
    ),
    "{% for m in messages if m['role'] != 'tool' %}{{ m }}{% endfor %}{{ tools }}": (
        ROWS["text after a result"],
        "it leaves out the results of tools",
    ),
    "{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'][0] if m['tool_calls'] }}"
    "{% endfor %}{{ tools }}": (
        ROWS["text after a result"] | {"prompt": [ASK, calling("Paris", "Rome"), RESULT]},
        "it leaves out calls after the first",
    ),
    "{{ messages | length }}{% for m in messages %}{{ m }}{% endfor %}{{ tools }}": (
        ROWS["the wrong call"],
        "with an answer, it writes the prompt otherwise than without",
    ),
}


@pytest.mark.parametrize("template", LEFT_OUT)
def test_what_a_template_leaves_out_is_named(tmp_path, template):
    row, reason = LEFT_OUT[template]
    tokenizer, pairs = tokenize(tmp_path, template, row)
    assert pairs == []
    assert tokenizer.dropped.counts == {"refused by the chat template": 1}
    assert reason in tokenizer.dropped.listed()


def test_text_of_calls_that_spells_a_special_token_stays_text(tmp_path):
    row = {
        "tools": [{"name": "weather<eos>", "description": "<eos>", "parameters": PARAMETERS}],
        "prompt": [ASK, calling("<eos>"), RESULT | {"content": "<eos>17"}],
        "chosen": [calling("<bos>Paris")],
        "rejected": [assistant("<eos><end_of_turn>")],
    }
    tokenizer, (pair,) = tokenize(tmp_path, "qwen2_5", row)
    special = set(tokenizer.tokenizer.all_special_ids)
    assert not special & {*pair.prompt[1:], *pair.chosen[:-1], *pair.rejected[:-1]}
    assert "<bos>Paris" in tokenizer.tokenizer.decode(pair.chosen)
    assert tokenizer.tokenizer.decode(pair.prompt).count("<eos>") == 4


def test_text_that_a_template_writes_as_python_does_stays_text(tmp_path):
    """LFM2.5's writes a list in an argument as Python prints it."""
    row = ROWS["a call is better"] | {"chosen": [calling(["<eos>", "a"])]}
    tokenizer, (pair,) = tokenize(tmp_path, "lfm2_2_5", row)
    assert tokenizer.tokenizer.eos_token_id not in pair.chosen
    assert "['<eos>', 'a']" in tokenizer.tokenizer.decode(pair.chosen)


@pytest.mark.parametrize("template", ["qwen3", "qwen3_6", "nemotron_3_nano"])
def test_a_template_may_cut_the_data_at_a_special_token(tmp_path, template):
    """What follows is rendered as ever: control tokens of the template are no text."""
    made = tiny.tokenizer()
    made.add_tokens(
        [AddedToken(text, special=True) for text in ("</think>", "<|im_start|>", "<|im_end|>")],
        special_tokens=True,
    )
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    made.save_pretrained(tmp_path)
    folder = ModelFolder(str(tmp_path), tmp_path, None)
    tokenizer = PairTokenizer(folder, None, 5000, 4000, DroppedRows())
    prompt = [ASK, assistant("<think>hm</think>Paris?"), user("Yes.")]
    row = {"prompt": prompt, "chosen": "17 degrees.", "rejected": "No idea."}
    (pair,) = tokenizer([parse_row(row, 0, "here")])
    plain = tokenizer.tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert pair.prompt == tokenizer.tokenizer(plain, add_special_tokens=False).input_ids


def test_a_long_call_is_truncated_and_has_no_end(tmp_path):
    row = ROWS["the wrong call"] | {"chosen": [calling("Paris " * 50)]}
    tokenizer, (whole,) = tokenize(tmp_path, "qwen2_5", row)
    room = len(whole.chosen) - 20
    tokenizer.max_length = len(whole.prompt) + room
    (cut,) = tokenizer([parse_row(row, 0, "here")])
    assert cut.chosen == whole.chosen[:room]
    assert cut.rejected == whole.rejected


# -- how other tools write them -------------------------------------------------------------------

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
WRITTEN = {
    "arguments as text": {
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": CALL | {"arguments": '{"city": "Paris"}'}}]}],
    },
    "without the outer object": {
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [ABOUT],
    },
    "function_call": {"chosen": [{"role": "assistant", "function_call": CALL}]},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": ASK["content"]},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "17 degrees"},
        ],
        "chosen": {"from": "function_call", "value": json.dumps([CALL])},
        "tools": json.dumps([ABOUT]),
    },
    "nulls of a table": {
        "chosen": [{"role": "assistant", "content": "", "name": None, "tool_calls": [
            {"type": "function", "id": None, "function": {
                "name": "weather", "arguments": {"city": "Paris", "day": None}}}]}],
        "tools": [{"type": "function", "function": ABOUT | {"strict": None}}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_a_call_is_the_same_pair(name):
    row = {"tools": TOOLS, "prompt": [ASK], "rejected": [assistant("No.")]} | WRITTEN[name]
    prompt = [ASK]
    if "conversations" in row:
        row = {"conversations": row["conversations"], **row}
        del row["prompt"]
        prompt = [ASK, calling("Paris"), {"role": "tool", "content": "17 degrees"}]
    pair = parse_row(row, 0, "here")
    assert (pair.prompt, pair.tools) == (prompt, TOOLS)
    assert (pair.chosen, pair.rejected) == (calling("Paris"), assistant("No."))


def test_a_name_and_the_numbers_of_calls_are_kept():
    row = ROWS["after a result"] | {
        "prompt": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [call("Paris", id="a1")]},
            {"role": "function", "name": "weather", "tool_call_id": "a1", "content": "17"},
        ]
    }
    asked, called, returned = parse_row(row, 0, "here").prompt
    assert asked == ASK and called["tool_calls"] == [call("Paris", id="a1")]
    assert returned == {"role": "tool", "name": "weather", "tool_call_id": "a1", "content": "17"}


def test_pairs_that_differ_in_their_tools_are_no_duplicates(tmp_path):
    row = ROWS["text after a result"]
    other = [{"type": "function", "function": ABOUT | {"name": "tides"}}]
    rows = [row, row | {"tools": other}, row]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    dropped = DroppedRows()
    source = open_source(str(path), None, None, deduplicate=True)
    assert [pair.row for pair in read_pairs(source, dropped)] == [0, 1]
    assert dropped.counts == {"duplicate": 1}


def test_a_table_fills_calls_with_nulls_that_are_not_read(tmp_path):
    """Arrow gives every struct the fields of all rows."""
    tide = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
    rows = [
        ROWS["the wrong call"],
        ROWS["the wrong call"] | {"chosen": [calling("Paris") | {"tool_calls": [tide]}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    source = open_source(str(tmp_path / "data.parquet"), None, None)
    first, second = read_pairs(source, DroppedRows())
    assert first == parse_row(rows[0], 0, "")
    assert second.chosen["tool_calls"][0] == tide


WRONG = {
    "no JSON": ({"tools": "weather"}, "the column tools is no JSON"),
    "a number": ({"tools": 3}, "the column tools is no list of objects"),
    "no name": ({"tools": [{"type": "function"}]}, "a tool without a name"),
    "a call without a name": (
        {"chosen": [assistant("") | {"tool_calls": [{"function": {"arguments": {}}}]}]},
        "a call without a name",
    ),
    "arguments": (
        {"chosen": [assistant("") | {"tool_calls": [CALL | {"arguments": [1]}]}]},
        "what a call passes is no object",
    ),
    "arguments as text": (
        {"chosen": [assistant("") | {"tool_calls": [CALL | {"arguments": "Paris"}]}]},
        "what a call passes is no JSON",
    ),
    "deep": ({"tools": "[" * 100_000}, "the column tools is no JSON"),
    "no JSON value": ({"tools": [{"name": "f", "parameters": {1, 2}}]}, "is no JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tools_are_named(name):
    change, detail = WRONG[name]
    row = {"prompt": [ASK], "chosen": [assistant("a")], "rejected": [assistant("b")]} | change
    with pytest.raises(BadRow) as caught:
        parse_row(row, 0, "here")
    assert caught.value.reason == "wrong tools" and detail in caught.value.detail


def test_half_a_character_in_a_call_is_named():
    row = ROWS["a call is better"] | {"chosen": [calling("\ud800")]}
    with pytest.raises(BadRow, match="lone surrogate"):
        parse_row(row, 0, "here")


def test_a_side_of_a_call_and_its_result_is_more_than_one_answer():
    row = ROWS["a call is better"] | {"chosen": [calling("Paris"), RESULT, assistant("17.")]}
    with pytest.raises(BadRow, match="not one answer"):
        parse_row(row, 0, "here")
