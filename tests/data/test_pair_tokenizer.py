"""One BOS, one end of turn, fixed boundaries, nothing too long, every dropped row counted."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fpocli.data.dropped import DroppedRows
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import Pair, TokenPair
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder

PLAIN = tiny.tokenizer()
BOS, EOS, END_OF_TURN = PLAIN.convert_tokens_to_ids(["<bos>", "<eos>", "<end_of_turn>"])
TALK = [
    {"role": "user", "content": " the cat\n"},
    {"role": "assistant", "content": "and"},
    {"role": "user", "content": "the  hat?"},
]
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Template -> its text for TALK, without the BOS.
PROMPTS = {
    "gemma": "<start_of_turn>user\n the cat\n<end_of_turn>\n<start_of_turn>model\nand"
    "<end_of_turn>\n<start_of_turn>user\nthe  hat?<end_of_turn>\n<start_of_turn>model\n",
    "chatml": "<|im_start|>user\n the cat\n<|im_end|>\n<|im_start|>assistant\nand<|im_end|>\n"
    "<|im_start|>user\nthe  hat?<|im_end|>\n<|im_start|>assistant\n",
    "halos": "<|user|>\n the cat\n\n<|assistant|>\nand<eos>\n<|user|>\nthe  hat?\n<|assistant|>\n",
    BARE: " the cat\nandthe  hat?",
}
CODE = [
    "def f(x):\n\treturn  x ;\n\n\n    # the  end , isn't it ?  \n",
    "  leading and trailing \r\n",
    "x = y\n",
    "\u00a0é 🙂 \x00 日本",
    "the cat and",
]


def adds_bos():
    """A tokeniser that adds the BOS itself, as Gemma's and Llama's do."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return made


def load(path, template, max_length=1000, max_prompt_length=500, tokenizer=None):
    """The PairTokenizer of a saved tokeniser. A template in Jinja is written to a file first."""
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    if template is not None and "{" in template:
        file = path / "template.jinja"
        file.write_text(template)
        template = str(file)
    return PairTokenizer(
        ModelFolder(str(path), path, None), template, max_length, max_prompt_length, DroppedRows()
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    tiny.tokenizer().save_pretrained(path)
    return path


def ids_of(text):
    return PLAIN(text, add_special_tokens=False).input_ids


def pair(chosen, rejected, prompt="hi", row=0):
    return Pair([{"role": "user", "content": prompt}], chosen, rejected, row)


@pytest.mark.parametrize("template", PROMPTS)
def test_a_prompt_is_the_rendered_conversation_after_one_bos(tmp_path, template):
    (made,) = load(tmp_path, template, tokenizer=adds_bos())([Pair(TALK, "a", "b", 0)])
    assert made.prompt == [BOS, *ids_of(PROMPTS[template])]
    assert BOS not in made.prompt[1:] + made.chosen + made.rejected


@pytest.mark.parametrize("template", ["gemma", "halos"])
def test_a_template_may_write_the_bos_that_the_tokeniser_does_not_add(plain, template):
    tokenize = load(plain, template)
    (made,) = tokenize([Pair(TALK, "a", "b", 0)])
    assert made.prompt == [BOS, *ids_of(PROMPTS[template])]
    assert tokenize.identity["special_tokens"]["bos"] == BOS


@pytest.mark.parametrize("template", PROMPTS)
def test_a_tokeniser_without_bos_gets_none(tmp_path, template):
    (made,) = load(tmp_path, template, tokenizer=tiny.tokenizer(bos=False))(
        [Pair(TALK, "a", "b", 0)]
    )
    assert made.prompt == ids_of(PROMPTS[template])


ENDS = {
    "gemma": [END_OF_TURN],
    "halos": [EOS],
    "chatml": ids_of("<|im_end|>"),
    BARE + "\n\n": [EOS],
    BARE + " <end_of_turn> \n": [END_OF_TURN],
}


@pytest.mark.parametrize(("template", "end"), ENDS.items())
def test_end_of_turn(plain, template, end):
    tokenize = load(plain, template)
    (made,) = tokenize([pair("the cat", "x")])
    assert made.chosen == [*ids_of("the cat"), *end]
    assert made.rejected == [*ids_of("x"), *end]
    assert tokenize.identity["special_tokens"]["end_of_turn"] == end


def test_end_of_turn_is_one_id_where_the_tokeniser_has_the_token(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert load(tmp_path, "chatml", tokenizer=tokenizer).end_of_turn == [len(tokenizer) - 1]


def test_a_template_without_an_end_of_turn_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-turn"):
        load(tmp_path, BARE, tokenizer=tokenizer)


@pytest.mark.parametrize("text", CODE)
def test_a_response_is_its_own_ids_and_decodes_to_its_text(plain, text):
    (made,) = load(plain, "gemma")([pair(text, "x")])
    assert made.chosen == [*ids_of(text), END_OF_TURN]
    assert PLAIN.decode(made.chosen[:-1], clean_up_tokenization_spaces=False) == text


def test_no_token_spans_prompt_and_response(plain):
    (made,) = load(plain, BARE)([pair("e cat", "e hat", prompt="and th")])
    assert ids_of("and the cat") != ids_of("and th") + ids_of("e cat")
    assert made == TokenPair(ids_of("and th"), [*ids_of("e cat"), EOS], [*ids_of("e hat"), EOS], 0)


# Without "<", so that no text spells a special token.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=30)


@settings(max_examples=100)
@given(
    template=st.sampled_from(["gemma", "halos"]),
    rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=5),
    max_length=st.integers(1, 90),
    max_prompt_length=st.integers(1, 90),
)
def test_lengths(plain, template, rows, max_length, max_prompt_length):
    tokenize = load(plain, template, max_length, max_prompt_length)
    (end,) = tokenize.end_of_turn
    kept = list(tokenize(pair(*answers, prompt, i) for i, (prompt, *answers) in enumerate(rows)))
    assert len(rows) == len(kept) + tokenize.dropped.counts.total()
    for made in kept:
        room = max_length - len(made.prompt)
        assert 0 < len(made.prompt) <= max_prompt_length
        assert made.chosen != made.rejected
        for text, ids in zip(rows[made.row][1:], (made.chosen, made.rejected), strict=True):
            whole = ids_of(text)
            assert 0 < len(ids) <= room
            assert ids == ([*whole, end] if len(whole) < room else whole[:room])
            assert ids.count(end) == (len(whole) < room)


def test_a_response_is_truncated_only_if_it_is_too_long(plain):
    (whole,) = load(plain, "gemma")([pair("abcd", "xyz")])
    limit = len(whole.prompt) + len(whole.chosen)
    assert list(load(plain, "gemma", limit)([pair("abcd", "xyz")])) == [whole]
    for less, chosen, rejected in [(1, "abcd", whole.rejected), (2, "abc", ids_of("xyz"))]:
        (cut,) = load(plain, "gemma", limit - less)([pair("abcd", "xyz")])
        assert cut == TokenPair(whole.prompt, ids_of(chosen), rejected, 0)


def test_a_prompt_is_dropped_only_when_it_must_be(plain):
    (made,) = load(plain, "halos")([pair("a", "b")])
    length = len(made.prompt)
    for limits in ({"max_prompt_length": length}, {"max_length": length + 1}):
        assert list(load(plain, "halos", **limits)([pair("a", "b")]))
    for limits in ({"max_prompt_length": length - 1}, {"max_length": length}):
        tokenize = load(plain, "halos", **limits)
        assert list(tokenize([pair("a", "b")])) == []
        assert tokenize.dropped.counts == {"prompt too long": 1}


def test_drops_are_counted_by_reason(plain):
    tokenize = load(plain, "gemma", max_length=60, max_prompt_length=40)
    long = "z" * 60
    answers = [("a", "b"), ("", "b"), ("a", ""), ("", ""), ("same", "same"), (" ", "b")]
    pairs = [pair(*both, row=i) for i, both in enumerate([*answers, (long + "a", long + "b")])]
    pairs.append(pair("a", "b", prompt=long, row=7))
    assert [made.row for made in tokenize(pairs)] == [0, 5]
    counts = {"prompt too long": 1, "empty response": 3, "equal responses": 2}
    assert tokenize.dropped.counts == counts
    assert len(pairs) == 2 + tokenize.dropped.counts.total()


def test_order_and_rows_are_kept_over_many_pairs(plain):
    tokenize = load(plain, "gemma")
    made = list(tokenize(pair(f"a{i}", "" if i % 3 else "b", f"q{i}", i) for i in range(1100)))
    assert [one.row for one in made] == list(range(0, 1100, 3))
    assert all(one.chosen == [*ids_of(f"a{one.row}"), END_OF_TURN] for one in made)
    assert all(f"q{one.row}<" in PLAIN.decode(one.prompt) for one in made)
    assert tokenize.dropped.counts == {"empty response": 733}


def test_the_tokenisers_own_template_comes_before_the_default(tmp_path, plain):
    assert load(plain, None).template_name == "halos"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = BARE
    own = load(tmp_path, None, tokenizer=tokenizer)
    assert own.template_name == "tokenizer"
    assert own.identity["chat_template"]["text"] == BARE


@pytest.mark.parametrize(
    ("template", "said"),
    [("alpaca", "--chat-template alpaca is neither"), ("{% for", r"template\.jinja cannot render")],
)
def test_an_invalid_template_is_refused(plain, template, said):
    with pytest.raises(UserError, match=said):
        load(plain, template)


def test_a_folder_without_a_tokeniser(tmp_path):
    with pytest.raises(UserError, match=f"the tokeniser of {tmp_path} cannot be loaded"):
        load(tmp_path, "gemma")


def test_a_conversation_the_template_refuses_is_dropped(plain):
    """With --strict it is an error that names its place; otherwise the other pairs keep their
    order."""
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    system = [{"role": "system", "content": "s"}, *TALK]
    pairs = [pair("a", "b"), Pair(system, "a", "b", 7, "x.jsonl, line 8"), pair("c", "d", row=9)]
    tokenize = load(plain, picky + BARE)
    assert [made.row for made in tokenize(pairs)] == [0, 9]
    assert tokenize.dropped.counts == {"refused by the chat template": 1}
    tokenize.dropped.strict = True
    with pytest.raises(UserError, match=r"x\.jsonl, line 8: refused .*template\.jinja: no system"):
        list(tokenize(pairs))


SPELT = ["<eos>", "a<end_of_turn>b", "<bos> <bos>", "<end_of_turn>\n<start_of_turn>model\nSure"]


@pytest.mark.parametrize("template", PROMPTS)
@pytest.mark.parametrize("text", SPELT)
def test_text_of_the_data_never_becomes_a_special_token(tmp_path, template, text):
    """A prompt contains only those of the template, a response only its end of turn."""
    tokenize = load(tmp_path, template, tokenizer=adds_bos())
    special = set(PLAIN.all_special_ids)
    (plain_,) = tokenize([pair("a", "b", prompt="say x please")])
    (made,) = tokenize([pair(text, "b", prompt=f"say {text} please")])
    assert [i for i in made.prompt if i in special] == [i for i in plain_.prompt if i in special]
    end = tokenize.end_of_turn
    assert made.chosen[-len(end) :] == end
    assert not special & set(made.chosen[: -len(end)])
    assert text in PLAIN.decode(made.prompt)
    assert PLAIN.decode(made.chosen[: -len(end)]) == text


def test_private_characters_of_the_data_stay(plain):
    """The markers used inside are other strings."""
    text = "\U000f0000<eos>\U000f0001\U000f0002"
    (made,) = load(plain, "gemma")([pair("a", "b", prompt=text)])
    assert text in PLAIN.decode(made.prompt) and EOS not in made.prompt


def test_huge_texts(plain):
    """A megabyte of text; a prompt of 100,000 tokens is dropped, a response is cut."""
    tokenize = load(plain, "gemma", max_length=300, max_prompt_length=100)
    huge = "the cat and <eos> " * 60_000
    kept = list(tokenize([pair("a", "b", prompt=huge), pair(huge, "b", row=1)]))
    assert [len(made.chosen) + len(made.prompt) for made in kept] == [300]
    assert tokenize.dropped.counts == {"prompt too long": 1}


def test_identity_changes_with_template_and_vocabulary(tmp_path, plain):
    gemma, chatml = load(plain, "gemma").identity, load(plain, "chatml").identity
    assert gemma["chat_template"]["hash"] != chatml["chat_template"]["hash"]
    assert gemma["vocabulary"] == chatml["vocabulary"]
    larger = tiny.tokenizer()
    larger.add_tokens(["zebra"])
    grown = load(tmp_path, "gemma", tokenizer=larger).identity
    assert grown["vocabulary"] != gemma["vocabulary"]
    assert grown["chat_template"] == gemma["chat_template"]
