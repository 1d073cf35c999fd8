"""The pairs of a store where a feature is largest, and the tokens it fires on.

Shapes: n tokens of a response.
"""

from typing import Any

import numpy as np
import torch

from fpocli.config import InspectConfig
from fpocli.data.pairs import TokenPair
from fpocli.data.tokenizer import token_texts
from fpocli.features.site import Site
from fpocli.interpretation.activations import token_activations
from fpocli.model.language_model import load_model
from fpocli.model.network import choose_device
from fpocli.report.describe import describe_pair
from fpocli.scoring.loading import find_reference, one_site
from fpocli.scoring.saes import load_encoders
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.errors import UserError

_PAIRS = 5


def add_feature(store: Store, config: InspectConfig, tokenizer: Any) -> dict[str, Any]:
    """The example pairs of a page about a feature.

    Args:
        store: complete.
        config: names the feature, and where model and SAE are.
        tokenizer: the store's.

    Returns:
        `feature`: its number, site and largest activation; `examples`: as from `describe_pair`,
        with `tokens_of` by side the text and value of each piece.

    Raises:
        UserError: there is no such feature, or it fires nowhere among the stored ones; or the
            model or SAE is not found.
    """
    assert config.feature is not None
    store.require_complete()
    site, feature = one_site(store, config.at), config.feature
    if feature >= store.sites[str(site)]["d_sae"]:
        raise UserError(
            f"the SAE at {site} has no feature {feature}",
            f"its features are 0 to {store.sites[str(site)]['d_sae'] - 1}",
        )
    numbers = _largest_pairs(store, str(site), feature)
    if not numbers:
        raise UserError(
            f"feature {feature} is not among the stored features of any response at {site}",
            "choose one that `fpo inspect` lists",
        )
    pairs = [_tokens_of(store, number) for number in numbers]
    values = _activations(store, config, site, feature, pairs)
    examples = []
    for number, pair, sides in zip(numbers, pairs, values, strict=True):
        shown = describe_pair(store, number, tokenizer)
        shown["tokens_of"] = {
            name: _pieces(token_texts(tokenizer, ids), value)
            for name, ids, value in zip(
                ("chosen", "rejected"), (pair.chosen, pair.rejected), sides, strict=True
            )
        }
        examples.append(shown)
    largest = max(float(value.max()) for sides in values for value in sides)
    about = {"feature": feature, "site": str(site), "largest": largest}
    return {"feature": about, "examples": examples}


def _largest_pairs(store: Store, site: str, feature: int) -> list[int]:
    """The pairs in one of whose responses the pooled feature is largest, the largest first."""
    largest = np.zeros(store.pairs)
    with progress("Reading the features", store.blocks) as bar:
        for block in range(store.blocks):
            features = store.reference(block, store.tokens(block)).features[site]
            found = np.where(features.index == feature, features.value, 0)
            largest[store.pairs_in(block)] = found.max((1, 2))
            bar.advance()
    order = np.argsort(-largest, kind="stable")[:_PAIRS]
    return [int(number) for number in order if largest[number] > 0]


def _tokens_of(store: Store, number: int) -> TokenPair:
    block, row = divmod(number, store.block_size)
    return store.tokens(block).pair(row)


def _activations(
    store: Store, config: InspectConfig, site: Site, feature: int, pairs: list[TokenPair]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The feature's activation at every token of the responses, [n] each."""
    device = choose_device(config.device)
    folder = find_reference(store, config.model, trust_remote_code=config.trust_remote_code)
    dtype = getattr(torch, store.meta["model"]["dtype"])
    model = load_model(folder, [site], dtype, device).eval()
    check_against_transformers(model, store.tokens(0))
    named = [config.sae] if config.sae else []
    encoders = load_encoders(store, [site], named, model.config.hidden_size, device)
    found = token_activations(model, encoders[str(site)], site, pairs, [feature])
    return [(chosen[:, 0], rejected[:, 0]) for chosen, rejected in found]


def _pieces(texts: list[str], values: np.ndarray) -> list[dict[str, Any]]:
    """Text and value of each piece: a token, or the tokens of a character together, of which the
    largest value counts."""
    pieces: list[dict[str, Any]] = []
    waiting = 0.0
    for text, value in zip(texts, values.tolist(), strict=True):
        waiting = max(waiting, value)
        if text:
            pieces.append({"text": text, "value": waiting})
            waiting = 0.0
    return pieces
