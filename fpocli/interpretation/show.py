"""fpo features show: one feature of a store, its pairs, and the tokens it fires on.

Shapes: N pairs with reference values, column 0 is chosen, column 1 rejected.
"""

import json
from typing import Any

import numpy as np

from fpocli.config import ShowConfig
from fpocli.data.pairs import SIDES
from fpocli.display.single_features import show_feature
from fpocli.features.site import Site
from fpocli.features.sparse import to_sparse
from fpocli.interpretation.activations import load_model_and_sae
from fpocli.interpretation.contexts import find_contexts
from fpocli.interpretation.labels import neuronpedia_page, read_labels
from fpocli.model.network import choose_device
from fpocli.scoring.loading import find_reference, one_site, tokenizer_of
from fpocli.store.reader import Store
from fpocli.system.console import data_console, progress
from fpocli.system.errors import UserError

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

    Raises:
        UserError: there is no such feature.
    """
    m = store.widths[site]
    if feature >= m:
        raise UserError(
            f"{store.path} has no feature {feature} at {site}", f"its features are 0 to {m - 1}"
        )
    values = np.zeros((store.pairs, 2))
    with progress("Reading the store", store.blocks) as bar:
        for block in range(store.blocks):
            reference = store.reference(block, store.tokens(block))
            column = to_sparse(reference.features[site], m)[:, [feature]]
            values[store.pairs_in(block)] = column.toarray().reshape(-1, 2)
            bar.advance()
    # Without the pairs that have no reference values.
    numbers = np.delete(np.arange(store.pairs), store.non_finite)
    values = values[numbers]
    by_pair = values.max(1)
    order = np.argsort(-by_pair, kind="stable")[:pairs]
    known = values[values > 0]
    edges = np.histogram_bin_edges(known, _BINS) if len(known) else np.zeros(0)
    frequency = store.frequency(site)[:, feature] / store.scored
    return {
        "pairs": store.scored,
        "frequency": dict(zip(SIDES, frequency.tolist(), strict=True)),
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
                "side": SIDES[int(np.argmax(values[row]))],
                "value": float(by_pair[row]),
            }
            for row in order
            if by_pair[row] > 0
        ],
    }


def _by_side(values: np.ndarray, measure: Any) -> dict[str, Any]:
    return {side: measure(values[:, column]) for column, side in enumerate(SIDES)}


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
    wanted = [2 * one["pair"] + SIDES.index(one["side"]) for one in largest]
    found = find_contexts(model, encoder, tokenizer, store.pair, {config.feature: wanted})
    return [
        {"pair": one["pair"], **shown}
        for one, shown in zip(largest, found[config.feature], strict=True)
    ]
