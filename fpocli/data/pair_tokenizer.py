"""Pair -> three runs of token ids: prompt, chosen, rejected.

The prompt is the chat template with its generation prompt; each response is tokenised on its own
and joined as ids, so no token boundary moves. Responses end with the template's end-of-turn
token, unless they were cut. Text of the data never becomes a special token.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fpocli.data.dropped import Drops
from fpocli.data.layouts import Message, Pair
from fpocli.system.console import console
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, refuse_code

# `{{ bos_token }}` renders as nothing where the tokeniser has none.
CHAT_TEMPLATES = {
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) "
        "+ '\n' + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "halos": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
DEFAULT_TEMPLATE = "halos"
_ANSWER = "the answer stands here"


@dataclass(frozen=True)
class TokenPair:
    """The three token runs of a pair, none of them empty.

    Args:
        prompt, chosen, rejected: token ids.
        row: the pair's row in the source; -1 where it has none.
    """

    prompt: Sequence[int] | np.ndarray
    chosen: Sequence[int] | np.ndarray
    rejected: Sequence[int] | np.ndarray
    row: int = -1

    def __len__(self) -> int:
        """Tokens of the pair, the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class PairTokenizer:
    """Tokenises pairs and counts why some are dropped.

    Args:
        folder: where the tokeniser's files are.
        chat_template: a name of CHAT_TEMPLATES, a Jinja file, or None for the tokeniser's own.
        max_length: tokens of prompt plus response; a longer response loses its end.
        max_prompt_length: a pair with a longer prompt is dropped.
        drops: told of the pairs that are dropped.

    Raises:
        UserError: there is no tokeniser, or the template cannot be read or rendered.
    """

    def __init__(
        self,
        folder: ModelFolder,
        chat_template: str | None,
        max_length: int,
        max_prompt_length: int,
        drops: Drops,
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.drops = drops
        self.max_length = max_length
        self.max_prompt_length = min(max_prompt_length, max_length - 1)
        self.template_name = self._set_template(chat_template)
        self.end_of_turn = self._end_of_turn()
        self.bos = self._bos()
        self.identity = {
            "source": folder.source,
            "revision": folder.revision,
            "vocabulary": vocabulary_hash(self.tokenizer),
            "chat_template": {
                "name": self.template_name,
                "hash": hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest(),
                "text": self.tokenizer.chat_template,
            },
            "special_tokens": {"bos": self.bos, "end_of_turn": self.end_of_turn},
        }

    def __call__(self, pairs: Iterable[Pair]) -> Iterator[TokenPair]:
        """The pairs that can be scored, in order; `drops` is told of the others."""
        pairs = iter(pairs)
        while group := list(islice(pairs, 512)):
            prompts = [self._prompt(pair) for pair in group]
            texts = list(chain(*((pair.chosen, pair.rejected) for pair in group)))
            responses = encode_text(self.tokenizer, texts)
            chosen, rejected = responses[::2], responses[1::2]
            for pair, prompt, good, bad in zip(group, prompts, chosen, rejected, strict=True):
                if prompt is None:
                    continue
                tokens, reason = self._assemble(pair, prompt, good, bad)
                if tokens is None:
                    self.drops.add(reason, pair.row, pair.place)
                else:
                    yield tokens

    def _prompt(self, pair: Pair) -> list[int] | None:
        """The ids of a pair's prompt; None, and told to `drops`, if the template refuses it."""
        try:
            parts = _render_parts(self.tokenizer, pair.prompt)
        except Exception as error:  # a template is a program of the user's and may raise anything
            detail = f"{self.template_name}: {error}"
            self.drops.add("refused by the chat template", pair.row, pair.place, detail)
            return None
        return _encode_parts(self.tokenizer, parts, self.bos)

    def _assemble(
        self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> tuple[TokenPair | None, str]:
        if not prompt:
            return None, "empty prompt"
        if len(prompt) > self.max_prompt_length:
            return None, "prompt too long"
        if not chosen or not rejected:
            return None, "empty response"
        good, bad = (self._end(ids, self.max_length - len(prompt)) for ids in (chosen, rejected))
        if good == bad:
            return None, "equal responses"
        return TokenPair(prompt, good, bad, pair.row), ""

    def _end(self, response: list[int], room: int) -> list[int]:
        """The response with its end of turn; cut, and then without it, if there is no room."""
        whole = [*response, *self.end_of_turn]
        return whole if len(whole) <= room else response[:room]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return _ids(self.tokenizer, texts, add_special_tokens=False)

    def _render(self, question: str, answer: str = "") -> str:
        messages = [{"role": "user", "content": question}]
        if answer:
            messages.append({"role": "assistant", "content": answer})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answer
            )
        except Exception as error:  # as in _prompt
            raise UserError(
                f"the chat template {self.template_name} refuses a question: {error}",
                "give another one with --chat-template",
            ) from error

    def _set_template(self, choice: str | None) -> str:
        if choice is None and self.tokenizer.chat_template:
            if not isinstance(self.tokenizer.chat_template, str):
                self.tokenizer.chat_template = self.tokenizer.chat_template["default"]
            return "tokenizer"
        name = choice or DEFAULT_TEMPLATE
        if name in CHAT_TEMPLATES:
            self.tokenizer.chat_template = CHAT_TEMPLATES[name]
        elif Path(name).is_file():
            self.tokenizer.chat_template = Path(name).read_text(encoding="utf-8", errors="replace")
        else:
            raise UserError(
                f"--chat-template {name} is neither a known name nor a file",
                f"known names: {', '.join(CHAT_TEMPLATES)}",
            )
        return name

    def _end_of_turn(self) -> list[int]:
        """What the template puts after an answer, without the white space that follows it."""
        whole = self._render("a question", _ANSWER)
        _, found, end = whole.rpartition(_ANSWER)
        if not found:
            raise UserError(
                f"the chat template {self.template_name} leaves the answer out",
                "give another one with --chat-template",
            )
        end = end.strip()
        if ids := self._encode([end])[0]:
            if len(ids) > 1:
                console.print(
                    f"note: the tokeniser does not know {end!r}, with which the chat template "
                    f"{self.template_name} ends a turn; it becomes {len(ids)} tokens"
                )
            return ids
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "neither the chat template nor the tokeniser has an end-of-turn token",
                "give a template that ends a turn with --chat-template",
            )
        return [self.tokenizer.eos_token_id]

    def _bos(self) -> int | None:
        """The id every prompt starts with, or None for a tokeniser that uses none.

        A template that writes the token has written it already; one that does not relies on the
        tokeniser to add it.
        """
        bos = self.tokenizer.bos_token_id
        prompt = self._encode([self._render("a question")])[0]
        adds = _ids(self.tokenizer, ["a"])[0][:1] == [bos]
        return bos if bos is not None and (adds or prompt[:1] == [bos]) else None


def encode_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of texts of the data; what spells a special token stays text."""
    return _ids(tokenizer, texts, add_special_tokens=False, split_special_tokens=True)


def _ids(tokenizer: Any, texts: list[str], **how: bool) -> list[list[int]]:
    try:
        return tokenizer(texts, **how).input_ids
    except Exception as error:  # tokenizers raises no other class, such as at an unknown character
        raise UserError(
            f"the tokeniser of {tokenizer.name_or_path} cannot encode a text: {error}",
            "its tokenizer.json is damaged, or lacks the token for what is unknown",
        ) from error


def encode_prompt(tokenizer: Any, messages: list[Message], bos: int | None) -> list[int]:
    """Ids of a conversation in the tokeniser's chat template, with its generation prompt.

    Args:
        tokenizer: transformers', with a chat template.
        messages: the conversation; what spells a special token in it stays text.
        bos: the id to begin with, once, whether the template writes it or not; or None.
    """
    return _encode_parts(tokenizer, _render_parts(tokenizer, messages), bos)


def _render_parts(tokenizer: Any, messages: list[Message]) -> list[str]:
    """The rendered conversation; every second part of it spells a special token in the data."""
    spelt = _special_pattern(tokenizer)
    marks = None
    if any(spelt.search(message["content"]) for message in messages):
        marks = left, right = _unused_characters(messages)
        messages = [
            message | {"content": spelt.sub(rf"{left}\g<0>{right}", message["content"])}
            for message in messages
        ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return re.split(f"[{''.join(marks)}]", text) if marks else [text]


def _encode_parts(tokenizer: Any, parts: list[str], bos: int | None) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(parts):
        if part and number % 2:
            ids += encode_text(tokenizer, [part])[0]
        elif part:
            ids += _ids(tokenizer, [part], add_special_tokens=False)[0]
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds what spells a special token; never, if there is none."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    longest_first = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unused_characters(messages: list[Message]) -> tuple[str, str]:
    """Two characters for private use that are not in the conversation."""
    used = {character for message in messages for character in message["content"]}
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    return next(free), next(free)


def load_tokenizer(folder: ModelFolder) -> Any:
    """transformers' tokeniser of a model folder, with no clean-up of white space.

    Raises:
        UserError: there is none, or it needs code that may not be run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder.path,
            clean_up_tokenization_spaces=False,
            trust_remote_code=folder.trust_remote_code,
        )
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        refuse_code(folder, error)
        raise UserError(
            f"{folder.source} has no tokeniser that transformers can load: {error}",
            "the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def vocabulary_hash(tokenizer: Any) -> str:
    """sha256 over all that makes ids of a text: vocabulary, merges, normaliser, pre-tokeniser."""
    about: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        about |= {name: state[name] for name in ("model", "normalizer", "pre_tokenizer")}
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
