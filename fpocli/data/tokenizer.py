"""transformers' tokeniser of a model folder; text of the data never becomes a special token."""

import hashlib
import json
from typing import Any

from fpocli.data.pairs import Message
from fpocli.data.rendering import render
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, refuse_code


def encode_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of texts of the data; text that spells a special token stays text."""
    return encode(tokenizer, texts, add_special_tokens=False, split_special_tokens=True)


def encode(tokenizer: Any, texts: list[str], **how: bool) -> list[list[int]]:
    """Ids of texts.

    Raises:
        UserError: the tokeniser cannot encode one of them.
    """
    if not texts:  # at which transformers raises an IndexError
        return []
    try:
        return tokenizer(texts, **how).input_ids
    except Exception as error:  # tokenizers raises no other class, such as at an unknown character
        raise UserError(
            f"the tokeniser of {tokenizer.name_or_path} cannot encode a text: {error}",
            "its tokenizer.json is damaged, or lacks the unknown token",
        ) from error


def encode_prompt(tokenizer: Any, messages: list[Message], bos: int | None) -> list[int]:
    """Ids of a conversation in the tokeniser's chat template, with its generation prompt.

    Args:
        tokenizer: transformers', with a chat template.
        messages: the conversation; text that spells a special token stays text.
        bos: the id that starts the prompt once, whether the template writes it or not; or None.
    """
    return encode_rendered(tokenizer, render(tokenizer, messages, [])[0], bos)


def encode_rendered(tokenizer: Any, parts: list[str], bos: int | None) -> list[int]:
    """Ids of the parts that rendering.py gives, with one BOS token if there is one."""
    ids: list[int] = []
    for number, part in enumerate(parts):
        if part and number % 2:
            ids += encode_text(tokenizer, [part])[0]
        elif part:
            ids += encode(tokenizer, [part], add_special_tokens=False)[0]
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def load_tokenizer(folder: ModelFolder) -> Any:
    """transformers' tokeniser of a model folder, without clean-up of white space.

    Raises:
        UserError: it cannot be loaded, or needs remote code that is not allowed.
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
            f"the tokeniser of {folder.source} cannot be loaded: {error}",
            "the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def vocabulary_hash(tokenizer: Any) -> str:
    """sha256 over everything that turns text into ids: vocabulary, merges, normaliser,
    pre-tokeniser."""
    about: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        about |= {name: state[name] for name in ("model", "normalizer", "pre_tokenizer")}
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
