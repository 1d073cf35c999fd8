"""fpo features show: one feature of a store, its pairs, and the tokens it fires on.

Shapes: N pairs with reference values, K stored features; column 0 is chosen, column 1 rejected.
"""

import json
from typing import Any

import numpy as np

from fpocli.config import ShowConfig
from fpocli.display.single_features import show_feature
from fpocli.features.site import Site
from fpocli.features.top_features import TopFeatures
from fpocli.interpretation.activations import load_model_and_sae, token_activations
from fpocli.interpretation.contexts import context
from fpocli.interpretation.labels import neuronpedia_page, read_labels
from fpocli.model.network import choose_device
from fpocli.scoring.loading import find_reference, one_site, tokenizer_of
from fpocli.store.reader import Store
from fpocli.system.console import data_console, progress
from fpocli.system.errors import UserError

_SIDES = ("chosen", "rejected")
_BINS = 10


def show(config: ShowConfig) -> dict[str, Any]:
    """Describe a feature of a store, and print it.

    Args:
        config: the settings.

    Returns:
        frequency, values and largest pairs of the feature, and its contexts.

    Raises:
        UserError: there is no such feature, or the store, model or SAE cannot be used.
    """
    store = Store.open(config.store)
    store.require_complete()
    site = one_site(store, config.at)
    about = store.sites[str(site)]
    if config.feature >= about["d_sae"]:
        raise UserError(
            f"{store.path} has no feature {config.feature} at {site}",
            f"its features are 0 to {about['d_sae'] - 1}",
        )
    source = store.neuronpedia(str(site))
    labels = read_labels(config.labels, source) if config.labels else {}
    result = {
        "store": str(store.path),
        "site": str(site),
        "feature": config.feature,
        "label": labels.get(config.feature),
        "page": neuronpedia_page(source, config.feature),
        **describe_feature(store, str(site), config.feature, config.pairs),
    }
    result["contexts"] = _contexts(config, store, site, result["largest"][: config.contexts])
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show_feature(result, data_console())
    return result


def describe_feature(store: Store, site: str, feature: int, pairs: int) -> dict[str, Any]:
    """What a store holds of a feature.

    Args:
        store: a complete store.
        site: of the feature.
        feature: its index.
        pairs: how many of the largest responses are listed, at most one of each pair.

    Returns:
        `frequency`, the share of chosen and of rejected responses in which it is > 0, and `mean`
        over all responses, both exact; `stored`, the number of responses in which it is among the
        stored features, and `values`, their mean and histogram; `largest`, pair, side and value.
    """
    values = np.full((store.pairs, 2), np.nan)
    with progress("Reading the store", store.blocks) as bar:
        for block in range(store.blocks):
            reference = store.reference(block, store.tokens(block))
            values[store.pairs_in(block)] = values_of(reference.features[site], feature)
            bar.advance()
    # Without the pairs that have no reference values.
    numbers = np.delete(np.arange(store.pairs), store.non_finite)
    values = np.nan_to_num(values[numbers])
    by_pair = values.max(1)
    order = np.argsort(-by_pair, kind="stable")[:pairs]
    known = values[values > 0]
    edges = np.histogram_bin_edges(known, _BINS) if len(known) else np.zeros(0)
    frequency = store.frequency(site)[:, feature] / store.scored
    return {
        "pairs": store.scored,
        "frequency": dict(zip(_SIDES, frequency.tolist(), strict=True)),
        "mean": float(store.mean(site)[feature]),
        "stored": _by_side(values, lambda column: int((column > 0).sum())),
        "values": {
            "mean": _by_side(values, lambda column: float(column.mean())),
            "edges": edges.tolist(),
            "counts": _by_side(
                values, lambda column: np.histogram(column[column > 0], edges)[0].tolist()
            )
            if len(known)
            else {},
        },
        "largest": [
            {
                "pair": int(numbers[row]),
                "side": _SIDES[int(np.argmax(values[row]))],
                "value": float(by_pair[row]),
            }
            for row in order
            if by_pair[row] > 0
        ],
    }


def values_of(features: TopFeatures[np.ndarray], feature: int) -> np.ndarray:
    """A feature's stored values in b pairs: float64 [b, 2]; NaN where the store has none, 0 where
    all features > 0 are stored and this is not among them."""
    match = features.index == feature
    found = np.where(match.any(-1), (match * features.value).sum(-1, dtype=np.float64), np.nan)
    found[np.isnan(found) & (features.nonzero <= features.index.shape[-1])] = 0
    if feature in features.kept:
        found = features.kept_value[..., features.kept.tolist().index(feature)].astype(np.float64)
    return found


def _by_side(values: np.ndarray, measure: Any) -> dict[str, Any]:
    return {side: measure(values[:, column]) for column, side in enumerate(_SIDES)}


def _contexts(
    config: ShowConfig, store: Store, site: Site, largest: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The tokens around the largest activation in each of the listed responses; the reference is
    run over their pairs."""
    if not largest:
        return []
    folder = find_reference(store, config.reference, trust_remote_code=config.trust_remote_code)
    tokenizer = tokenizer_of(store, folder)
    device = choose_device(config.device)
    model, encoder = load_model_and_sae(store, folder, site, config.sae, device)
    pairs = [store.pair(one["pair"]) for one in largest]
    found = token_activations(model, encoder, pairs, [config.feature])
    contexts = []
    for one, pair, values in zip(largest, pairs, found, strict=True):
        side = _SIDES.index(one["side"])
        contexts.append({"pair": one["pair"], **context(tokenizer, pair, side, values[side][:, 0])})
    return contexts
