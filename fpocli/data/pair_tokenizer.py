"""Pair -> TokenPair: the token ids of prompt, chosen and rejected.

The prompt is the chat template with its generation prompt. Each response is tokenised separately
and its ids are appended, so no token boundary moves. Responses end with the template's end-of-turn
token, unless they were truncated. Text of the data never becomes a special token.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from fpocli.data.chat_templates import CHAT_TEMPLATES, DEFAULT_TEMPLATE
from fpocli.data.dropped import DroppedRows
from fpocli.data.pairs import Pair, TokenPair
from fpocli.data.tokenizer import (
    encode,
    encode_rendered,
    encode_text,
    load_tokenizer,
    render_prompt,
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
            prompts = [self._prompt(pair) for pair in group]
            texts = list(chain(*((pair.chosen, pair.rejected) for pair in group)))
            responses = encode_text(self.tokenizer, texts)
            chosen, rejected = responses[::2], responses[1::2]
            for pair, prompt, good, bad in zip(group, prompts, chosen, rejected, strict=True):
                if prompt is None:
                    continue
                tokens, reason = self._assemble(pair, prompt, good, bad)
                if tokens is None:
                    self.dropped.add(reason, pair.row, pair.place)
                else:
                    yield tokens

    def _prompt(self, pair: Pair) -> list[int] | None:
        """The ids of a pair's prompt; None, and the pair is dropped, if the template raises."""
        try:
            parts = render_prompt(self.tokenizer, pair.prompt)
        except Exception as error:  # a template is a program and may raise anything
            detail = f"{self.template_name}: {error}"
            self.dropped.add("refused by the chat template", pair.row, pair.place, detail)
            return None
        return encode_rendered(self.tokenizer, parts, self.bos)

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
        """The response with its end of turn; truncated, and then without it, if it is too long."""
        whole = [*response, *self.end_of_turn]
        return whole if len(whole) <= room else response[:room]

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
        except Exception as error:  # as in _prompt
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
