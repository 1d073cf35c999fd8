"""What is in a store, as data."""

from typing import Any

import numpy as np

from fpocli.features.top_features import TopFeatures
from fpocli.store.reader import Store
from fpocli.system.errors import UserError

# The paper's Figure 2 shows the 50 largest mean activations.
_FIGURE_2 = 50
_FREQUENT = 10
_PAIR_FEATURES = 10
# The percentile of the coverage is exact to one in this many.
_BINS = 10_000


def describe(store: Store) -> dict[str, Any]:
    """Everything about a store but its pairs."""
    spans, missing = store.read_array("spans"), store.unscored_blocks()
    lengths = np.diff(spans)
    pairs = np.arange(store.pairs)
    done = ~np.isin(pairs // store.block_size, missing) & ~np.isin(pairs, store.non_finite)
    margins = store.read_array("ref/margin")[done]
    total = spans[:, [2, 3]] - spans[:, [1, 2]] + (spans[:, 1] - spans[:, 0])[:, None]
    return {
        "path": str(store.path),
        **{name: store.meta[name] for name in ("format", "version", "state", "created", "writer")},
        "fingerprint": store.meta["fingerprint"],
        "blocks": {
            "done": store.blocks - len(missing),
            "all": store.blocks,
            "pairs_per_block": store.block_size,
        },
        **{name: store.meta[name] for name in ("model", "tokenizer", "data", "limits", "sites")},
        "allowed": store.meta.get("allowed", {}),
        "pairs": store.meta["pairs"],
        "sources": _sources(store, done),
        "lengths": {
            name: _spread(lengths[:, column])
            for column, name in enumerate(("prompt", "chosen", "rejected"))
        }
        | {"responses_at_limit": int((total == store.meta["limits"]["max_length"]).sum())},
        "margin": _margin(margins),
        "distributions": _distributions(store),
        "features": {site: _features(store, site) for site in store.sites}
        if store.meta["state"] == "complete"
        else {},
        "arrays": {
            name: {"bytes": raw, "stored_bytes": stored}
            for name, (raw, stored) in store.sizes().items()
        },
    }


def _sources(store: Store, done: np.ndarray) -> list[dict[str, Any]]:
    """Of a mixture each source with its pairs and their mean margin; [] without one."""
    if not store.is_mixture:
        return []
    numbers, margins = store.sources(), store.read_array("ref/margin")
    shown = []
    for number, about in enumerate(store.meta["data"]["sources"]):
        own = numbers == number
        found = margins[own & done]
        shown.append(
            about
            | {
                "pairs": int(own.sum()),
                "share": float(own.mean()),
                "margin": float(found.mean()) if len(found) else None,
            }
        )
    return shown


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "min": int(values.min()),
        "5%": float(low),
        "median": float(middle),
        "mean": round(float(values.mean()), 1),
        "95%": float(high),
        "max": int(values.max()),
    }


def _margin(margins: np.ndarray) -> dict[str, Any]:
    if not len(margins):
        return {}
    counts, edges = np.histogram(margins, bins=15)
    return {
        "mean": float(margins.mean()),
        "std": float(margins.std()),
        "above_0": float((margins > 0).mean()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _distributions(store: Store) -> dict[str, Any]:
    """What is stored of the next-token distributions, and how much of them: the probability of the
    stored tokens at the scored positions; {} in a store without."""
    about = store.distributions
    if about is None:
        return {}
    counts, total = np.zeros(_BINS, np.int64), 0.0
    for block in filter(store.is_scored, range(store.blocks)):
        mass = -np.expm1(store.rest(block).astype(np.float64))
        # float16 may round the rest to more than 1.
        mass = mass.clip(0, 1)
        counts += np.histogram(mass, _BINS, (0, 1))[0]
        total += mass.sum()
    shown = about._asdict() | {"positions": store.meta["distribution_rows"]["scored"]}
    if not (read := int(counts.sum())):
        return shown
    low = int(np.searchsorted(counts.cumsum(), 0.05 * read)) / _BINS
    return shown | {"coverage": {"mean": float(total / read), "5%": low}}


def _features(store: Store, site: str) -> dict[str, Any]:
    mean, frequency = store.mean(site), store.frequency(site)
    largest = np.argsort(-mean, kind="stable")[:_FIGURE_2]
    frequent = np.argsort(-frequency.sum(0), kind="stable")[:_FREQUENT]
    return {
        "active": int((frequency.sum(0) > 0).sum()),
        "largest_mean": [{"feature": int(i), "mean": float(mean[i])} for i in largest],
        "most_frequent": [
            {
                "feature": int(i),
                "chosen": float(frequency[0, i] / store.scored),
                "rejected": float(frequency[1, i] / store.scored),
            }
            for i in frequent
        ],
    }


def describe_pair(store: Store, pair: int, tokenizer: Any) -> dict[str, Any]:
    """The texts, scores and largest features of one pair.

    Args:
        store: the store.
        pair: its number, from 0.
        tokenizer: the store's.

    Raises:
        UserError: there is no such pair.
    """
    if pair >= store.pairs:
        raise UserError(f"{store.path} has no pair {pair}", f"its pairs are 0 to {store.pairs - 1}")
    block, row = divmod(pair, store.block_size)
    tokens = store.tokens(block)
    ids = tokens.pair(row)
    runs = {"prompt": ids.prompt, "chosen": ids.chosen, "rejected": ids.rejected}
    shown: dict[str, Any] = {
        "pair": pair,
        "source_row": ids.row,
        **({"source": ids.source} if store.is_mixture else {}),
        "tokens": {name: len(run) for name, run in runs.items()},
        "text": {name: tokenizer.decode(list(run)) for name, run in runs.items()},
    }
    if not store.is_scored(block) or pair in store.non_finite:
        return shown
    reference = store.reference(block, tokens)
    sums = dict(zip(("chosen", "rejected"), reference.logp[row].tolist(), strict=True))
    return shown | {
        "logp": sums,
        "average_logp": {name: sums[name] / shown["tokens"][name] for name in sums},
        "margin": float(reference.margin[row]),
        "features": {
            site: _pair_features(features, row) for site, features in reference.features.items()
        },
    }


def _pair_features(features: TopFeatures, row: int) -> dict[str, Any]:
    shown = {}
    for side, name in enumerate(("chosen", "rejected")):
        index, value = features.index[row, side], features.value[row, side]
        used = (value > 0)[:_PAIR_FEATURES]
        shown[name] = {
            "nonzero": int(features.nonzero[row, side]),
            "top": [
                {"feature": int(i), "value": float(v)}
                for i, v in zip(
                    index[:_PAIR_FEATURES][used], value[:_PAIR_FEATURES][used], strict=True
                )
            ],
        }
    return shown
