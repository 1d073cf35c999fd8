"""fpo features contrast: which features separate chosen from rejected responses.

Everything is made from the store; of the model only the tokeniser is used, for the texts.

Shapes: N pairs that have reference values, b such pairs of a block, K stored features, m features
of the site, c style measures. Column 0 is chosen, column 1 rejected.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from fpocli.config import ContrastConfig
from fpocli.display.feature_tables import show_contrast
from fpocli.features.sparse import to_sparse
from fpocli.interpretation.equal_style import EqualStyle
from fpocli.interpretation.labels import neuronpedia_page, read_labels
from fpocli.interpretation.paired_test import (
    PairedSums,
    correct,
    effect_size,
    sign_flip_p,
    student,
)
from fpocli.interpretation.style import STYLE, measure_style
from fpocli.scoring.loading import find_tokenizer, one_site
from fpocli.store.reader import Store
from fpocli.system.console import data_console, progress
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import json_number

# Of fewer pairs, the style measures alone would explain every difference.
FEWEST_PAIRS = 10


def contrast(config: ContrastConfig) -> dict[str, Any]:
    """Print which features separate chosen from rejected responses, and return it.

    Args:
        config: which store and site, and how much to show.

    Raises:
        UserError: the store is incomplete or has no such site, the tokeniser is not found, or the
            labels cannot be read.
    """
    store = Store.open(config.store)
    store.require_complete()
    site = str(one_site(store, config.at))
    source = store.neuronpedia(site)
    labels = read_labels(config.labels, source) if config.labels else {}
    tokenizer = find_tokenizer(store, config.model)
    style = style_of_responses(store, tokenizer)
    shown = contrast_store(store, site, style, config.rate, config.top, labels)
    if config.json:
        print(json.dumps(shown, indent=2))
    else:
        show_contrast(shown, data_console())
    return shown


def contrast_store(
    store: Store,
    site: str,
    style: np.ndarray,
    rate: float,
    top: int,
    labels: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Which features separate chosen from rejected responses, as `fpo features contrast` prints it.

    Args:
        store: complete.
        site: one of its sites.
        style: float64 [N, 2, c], from `style_of_responses`; the same for all sites.
        rate: share of false findings among the features found.
        top: number of features returned, by q, then by effect size.
        labels: descriptions of features.

    Returns:
        plain values for JSON; docs/features.md describes them.

    Raises:
        UserError: the store is damaged.
    """
    m = store.widths[site]
    by_style = style[:, 0] - style[:, 1]
    sums = PairedSums(m)
    regressions = {
        "length": EqualStyle(by_style[:, :1], m),
        "style": EqualStyle(by_style, m),
    }
    for chosen, rejected in _values(store, site):
        sums.add(chosen, rejected)
        for regression in regressions.values():
            regression.add(chosen - rejected)

    tested = sums.powers[1] > 0
    p = sign_flip_p(sums.powers[0], sums.powers[1])
    q = correct(p, tested)
    effect, interval = effect_size(sums)
    size = np.nan_to_num(np.abs(effect), nan=np.inf)
    order = [f for f in np.lexsort((-size, q)) if tested[f]][:top]
    frequency = store.frequency(site) / store.scored
    # The store's mean is of all values. So this is the sum of a feature's values that are not
    # stored, over N: the most by which the difference can be another one.
    missing = np.maximum(0, 2 * store.mean(site) - (sums.chosen + sums.rejected) / sums.pairs)
    equal = {name: regression.result() for name, regression in regressions.items()}

    def describe(f: int) -> dict[str, Any]:
        return {
            "feature": f,
            "label": (labels or {}).get(f),
            "page": neuronpedia_page(store.neuronpedia(site), f),
            "mean": _sides(sums.chosen[f] / sums.pairs, sums.rejected[f] / sums.pairs),
            "difference": float(sums.difference[f]),
            "missing": float(missing[f]),
            "frequency": _sides(*frequency[:, f]),
            "effect": json_number(effect[f]),
            "interval": _pair(interval[:, f]),
            "p": float(p[f]),
            "q": float(q[f]),
            **{
                f"at_equal_{name}": _left(sums.difference[f], left[f], bounds[:, f])
                for name, (left, bounds) in equal.items()
            },
        }

    return {
        "store": str(store.path),
        "site": site,
        "pairs": sums.pairs,
        "d_sae": m,
        "tested": int(tested.sum()),
        "rate": rate,
        "found": int((q[tested] <= rate).sum()),
        "stored_share": _stored_share(sums, missing),
        "style": _describe_style(style),
        "features": [describe(int(f)) for f in order],
    }


def _scored(store: Store, block: int) -> np.ndarray:
    """The rows of a block that have reference values."""
    rows = store.pairs_in(block)
    return np.flatnonzero(~np.isin(np.arange(rows.start, rows.stop), store.non_finite))


def style_of_responses(store: Store, tokenizer: Any) -> np.ndarray:
    """The style measures of every response: float64 [N, 2, c].

    Args:
        store: complete.
        tokenizer: the store's.

    Raises:
        UserError: the store has too few pairs for a contrast, or is damaged.
    """
    if store.scored < FEWEST_PAIRS:
        raise UserError(
            f"{store.path} has reference values of {store.scored} pairs, which is too few",
            f"cache at least {FEWEST_PAIRS} pairs; hundreds are needed to find anything",
        )
    measured = []
    with progress("Measuring the style of the responses", store.pairs) as bar:
        for block in range(store.blocks):
            tokens = store.tokens(block)
            for row in _scored(store, block):
                pair = tokens.pair(row)
                sides = [list(ids) for ids in (pair.chosen, pair.rejected)]
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sides]
                lengths = map(len, sides)
                measured.append([*map(measure_style, texts, lengths)])
            bar.advance(len(tokens))
    return np.array(measured, float)


def _values(store: Store, site: str) -> Iterator[tuple[csr_array, csr_array]]:
    """The stored values of chosen and of rejected responses, block by block: float64 [b, m]."""
    with progress("Reading the features", store.pairs) as bar:
        for block in range(store.blocks):
            tokens = store.tokens(block)
            features = store.reference(block, tokens).features[site]
            values = to_sparse(features, store.widths[site])
            rows = 2 * _scored(store, block)
            yield values[rows], values[rows + 1]
            bar.advance(len(tokens))


def _stored_share(sums: PairedSums, missing: np.ndarray) -> float | None:
    """The share of the sum of all pooled features that the store has."""
    stored = float((sums.chosen + sums.rejected).sum())
    total = stored + float(missing.sum()) * sums.pairs
    return stored / total if total > 0 else None


def _describe_style(style: np.ndarray) -> list[dict[str, Any]]:
    difference = style[:, 0] - style[:, 1]
    mean = difference.mean(0)
    half = student(len(style) - 1) * difference.std(0, ddof=1) / np.sqrt(len(style))
    return [
        {
            "name": name,
            "mean": _sides(*style[:, :, i].mean(0)),
            "difference": float(mean[i]),
            "interval": [float(mean[i] - half[i]), float(mean[i] + half[i])],
        }
        for i, name in enumerate(STYLE)
    ]


def _left(difference: float, left: float, bounds: np.ndarray) -> dict[str, Any]:
    return {
        "difference": float(left),
        "interval": _pair(bounds),
        "explained": float((difference - left) / difference) if difference else None,
    }


def _sides(chosen: float, rejected: float) -> dict[str, float]:
    return {"chosen": float(chosen), "rejected": float(rejected)}


def _pair(bounds: np.ndarray) -> list[float] | None:
    return [float(bound) for bound in bounds] if np.isfinite(bounds).all() else None
