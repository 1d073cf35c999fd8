"""Pair -> TokenPair: the token ids of prompt, chosen and rejected.

The prompt is the chat template with its generation prompt. Each response is tokenised separately
and its ids are appended, so no token boundary moves. Responses end with the template's end-of-turn
token, unless they were truncated. Text of the data never becomes a special token.

A response is its text. Where one of a pair calls tools, both are what the template writes of them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fpocli.data.chat_templates import CHAT_TEMPLATES, DEFAULT_TEMPLATE
from fpocli.data.dropped import DroppedRows
from fpocli.data.pairs import BadRow, Pair, TokenPair
from fpocli.data.rendering import left_out, render
from fpocli.data.tokenizer import (
    encode,
    encode_rendered,
    encode_text,
    load_tokenizer,
    vocabulary_hash,
)
from fpocli.system.console import warn
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder

_ANSWER = "the answer stands here"


class PairTokenizer:
    """Tokenises pairs, and drops those that do not fit.

    Args:
        folder: where the tokeniser's files are.
        chat_template: a name of CHAT_TEMPLATES, a Jinja file, or None for the tokeniser's own.
        max_length: tokens of prompt plus response; a longer response is truncated.
        max_prompt_length: a pair with a longer prompt is dropped.
        dropped: where dropped pairs are counted.

    Raises:
        UserError: the tokeniser cannot be loaded, or the template read or rendered.
    """

    def __init__(
        self,
        folder: ModelFolder,
        chat_template: str | None,
        max_length: int,
        max_prompt_length: int,
        dropped: DroppedRows,
    ) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.dropped = dropped
        self.max_length = max_length
        self.max_prompt_length = min(max_prompt_length, max_length - 1)
        self.template_name = self._set_template(chat_template)
        self.end_of_turn = self._end_of_turn()
        self.bos = self._bos()
        # Which parts of conversations with tools the template writes.
        self._shown: dict[tuple[Any, ...], bool] = {}
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
        """The pairs that can be scored, in order; the others go to `dropped`."""
        pairs = iter(pairs)
        while group := list(islice(pairs, 512)):
            # One call for all texts is faster than one for each.
            ids = iter(
                encode_text(self.tokenizer, [text for pair in group for text in _texts(pair)])
            )
            for pair in group:
                responses = [next(ids) for _ in _texts(pair)]
                try:
                    tokens = self._tokens(pair, responses)
                except BadRow as bad:
                    self.dropped.add(bad.reason, pair.row, pair.place, bad.detail)
                else:
                    yield tokens

    def _tokens(self, pair: Pair, responses: list[list[int]]) -> TokenPair:
        """The ids of a pair.

        Args:
            pair: the pair.
            responses: the ids of its responses that are text.

        Raises:
            BadRow: it does not fit, or the template refuses it.
        """
        prompt, rendered = self._rendered(pair)
        if not prompt:
            raise BadRow("empty prompt")
        if len(prompt) > self.max_prompt_length:
            raise BadRow("prompt too long")
        if not all(responses):
            raise BadRow("empty response")
        room = self.max_length - len(prompt)
        good, bad = rendered or [[*response, *self.end_of_turn] for response in responses]
        good, bad = self._cut(good, room), self._cut(bad, room)
        if good == bad:
            raise BadRow("equal responses")
        return TokenPair(prompt, good, bad, pair.row)

    def _cut(self, response: list[int], room: int) -> list[int]:
        """The response; if it is too long, truncated and without an end of turn."""
        if len(response) <= room:
            return response
        end = len(self.end_of_turn) if response[-len(self.end_of_turn) :] == self.end_of_turn else 0
        return response[: len(response) - end][:room]

    def _rendered(self, pair: Pair) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt, and of the responses that the template writes, if it does.

        Raises:
            BadRow: the template raises an error, or leaves something out.
        """
        answers = [one for one in (pair.chosen, pair.rejected) if not isinstance(one, str)]
        try:
            for talk in [[*pair.prompt, one] for one in answers] or [pair.prompt]:
                if what := left_out(self.tokenizer, talk, pair.tools, self._shown):
                    raise ValueError(f"it leaves out {what}")
            prompt, *written = render(self.tokenizer, pair.prompt, pair.tools, answers)
        except Exception as error:  # a template is a program and may raise anything
            detail = f"{self.template_name}: {error}"
            raise BadRow("refused by the chat template", detail) from error
        responses = [self._ended(encode_rendered(self.tokenizer, one, None)) for one in written]
        return encode_rendered(self.tokenizer, prompt, self.bos), responses

    def _ended(self, response: list[int]) -> list[int]:
        """A response as the template writes it, with an end if it writes none. After a call it may
        write another one than after text."""
        has_end = response[-len(self.end_of_turn) :] == self.end_of_turn
        if has_end or (response[-1:] and response[-1] in self.tokenizer.all_special_ids):
            return response
        return [*response, *self.end_of_turn]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encode(self.tokenizer, texts, add_special_tokens=False)

    def _render(self, question: str, answer: str = "") -> str:
        messages = [{"role": "user", "content": question}]
        if answer:
            messages.append({"role": "assistant", "content": answer})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answer
            )
        except Exception as error:  # as in _rendered
            raise UserError(
                f"the chat template {self.template_name} cannot render a question: {error}",
                "choose another one with --chat-template",
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
        """The ids that the template writes after an answer, without white space."""
        whole = self._render("a question", _ANSWER)
        _, found, end = whole.rpartition(_ANSWER)
        if not found:
            raise UserError(
                f"the chat template {self.template_name} does not render the answer",
                "choose another one with --chat-template",
            )
        end = end.strip()
        if ids := self._encode([end])[0]:
            if len(ids) > 1:
                warn(
                    f"note: {end!r}, which ends a turn in the chat template {self.template_name}, "
                    f"is not a token of the tokeniser; it becomes {len(ids)} tokens"
                )
            return ids
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "neither the chat template nor the tokeniser has an end-of-turn token",
                "choose a template that ends a turn with --chat-template",
            )
        return [self.tokenizer.eos_token_id]

    def _bos(self) -> int | None:
        """The id that every prompt starts with, or None if the tokeniser uses none: the template
        writes it, or the tokeniser adds it."""
        bos = self.tokenizer.bos_token_id
        prompt = self._encode([self._render("a question")])[0]
        adds = encode(self.tokenizer, ["a"])[0][:1] == [bos]
        return bos if bos is not None and (adds or prompt[:1] == [bos]) else None


def _texts(pair: Pair) -> list[str]:
    """The responses that are text: both, or none."""
    return [one for one in (pair.chosen, pair.rejected) if isinstance(one, str)]
