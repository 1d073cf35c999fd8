"""The pairs of a store where a feature is largest, and the tokens it fires on.

Shapes: n scored positions of a response.
"""

from itertools import chain
from typing import Any

import numpy as np

from fpocli.config import InspectConfig
from fpocli.data.pairs import TokenIds, TokenPair
from fpocli.features.site import Site
from fpocli.interpretation.activations import load_model_and_sae, token_activations
from fpocli.interpretation.contexts import pieces
from fpocli.interpretation.show import describe_feature
from fpocli.model.network import choose_device
from fpocli.report.describe import describe_pair
from fpocli.scoring.loading import find_reference, one_site
from fpocli.store.reader import Store
from fpocli.system.errors import UserError

_PAIRS = 5


def describe_feature_pairs(
    store: Store, config: InspectConfig, feature: int, tokenizer: Any
) -> dict[str, Any]:
    """The example pairs of a page about a feature.

    Args:
        store: complete.
        config: says at which site, and where model and SAE are.
        feature: its number.
        tokenizer: the store's.

    Returns:
        `feature`: its number, site and largest activation; `examples`: as from `describe_pair`,
        with `pieces` of prompt, chosen and rejected, each with `text` and `value`.

    Raises:
        UserError: there is no such feature, or no response has it among its stored ones; or the
            model or SAE is not found.
    """
    store.require_complete()
    site = one_site(store, config.at)
    largest = describe_feature(store, str(site), feature, _PAIRS)["largest"]
    if not largest:
        raise UserError(
            f"feature {feature} is not among the stored features of any response at {site}",
            "choose one that `fpo inspect` lists",
        )
    numbers = [one["pair"] for one in largest]
    pairs = [store.pair(number) for number in numbers]
    values = _activations(store, config, site, feature, pairs)
    examples = [
        describe_pair(store, number, tokenizer) | {"pieces": _pieces(tokenizer, pair, sides)}
        for number, pair, sides in zip(numbers, pairs, values, strict=True)
    ]
    highest = max(float(side.max()) for side in chain(*values))
    about = {"feature": feature, "site": str(site), "largest": highest}
    return {"feature": about, "examples": examples}


def _activations(
    store: Store, config: InspectConfig, site: Site, feature: int, pairs: list[TokenPair]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The feature's activation at every scored position of each pair's responses, [n]."""
    device = choose_device(config.device)
    folder = find_reference(store, config.model, trust_remote_code=config.trust_remote_code)
    model, encoder = load_model_and_sae(store, folder, site, config.sae, device)
    found = token_activations(model, encoder, pairs, [feature])
    return [(chosen[:, 0], rejected[:, 0]) for chosen, rejected in found]


def _pieces(
    tokenizer: Any, pair: TokenPair, values: tuple[np.ndarray, np.ndarray]
) -> dict[str, list[dict[str, Any]]]:
    """A pair's texts, token by token, with the activation at each. The first scored position is the
    last token of the prompt; no state of the last token of a response is scored."""
    chosen, rejected = values
    before = np.zeros(len(pair.prompt) - 1)
    return {
        "prompt": _texts(tokenizer, pair.prompt, np.append(before, chosen[0])),
        "chosen": _texts(tokenizer, pair.chosen, np.append(chosen[1:], 0)),
        "rejected": _texts(tokenizer, pair.rejected, np.append(rejected[1:], 0)),
    }


def _texts(tokenizer: Any, ids: TokenIds, values: np.ndarray) -> list[dict[str, Any]]:
    """Text and value of each token; of the tokens of one character together, the largest value."""
    found: list[dict[str, Any]] = []
    waiting = 0.0
    texts = pieces(tokenizer, [int(one) for one in ids])
    for text, value in zip(texts, values.tolist(), strict=True):
        waiting = max(waiting, value)
        if text:
            found.append({"text": text, "value": waiting})
            waiting = 0.0
    return found
