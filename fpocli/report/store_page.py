"""The page of fpo inspect --html: its numbers as data, and its charts.

Shapes: N pairs, m features of a site, K stored features. Column 0 is chosen, column 1 rejected.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fpocli.caching.open_store import DROPPED
from fpocli.config import ContrastConfig, InspectConfig
from fpocli.data.pairs import SIDES
from fpocli.display.page import write_page
from fpocli.display.page_charts import chosen_against_rejected, effects, histogram, ranked
from fpocli.interpretation.contrast import FEWEST_PAIRS, contrast_store, style_of_responses
from fpocli.report.describe import describe, describe_pair
from fpocli.report.feature_tokens import describe_feature_pairs
from fpocli.scoring.loading import find_tokenizer
from fpocli.store.reader import Store
from fpocli.system.console import progress, say

_BINS = 40
# Dropped rows shown of each reason.
_SHOWN_ROWS = 3
# Example pairs, by rising margin: the least, the quartiles and the largest.
_QUANTILES = (0, 0.25, 0.5, 0.75, 1)
# Features at the same place of the scatter plot, to this share, are one point of it.
_GRID = 0.005


def describe_for_page(store: Store, config: InspectConfig) -> dict[str, Any]:
    """Everything that the page shows: what `describe` gives, and more.

    Args:
        store: the store.
        config: whose flags say where the model and SAE are, and which feature is shown.

    Returns:
        plain values for JSON; every number of the page is among them.

    Raises:
        UserError: the tokeniser, or with --feature the model or SAE, is not found or another one.
    """
    tokenizer = find_tokenizer(store, config.model)
    shown = describe(store) | {
        "non_finite": len(store.non_finite),
        "dropped_rows": _dropped_rows(store.place.read_beside(DROPPED)),
        "length_histogram": _length_histogram(store),
        "frequencies": {site: _frequencies(store, site) for site in _complete_sites(store)},
        "contrast": _contrasts(store, tokenizer),
    }
    if config.feature is not None:
        return shown | describe_feature_pairs(store, config, config.feature, tokenizer)
    with progress("Reading example pairs", None):
        chosen = _examples_by_margin(store)
        examples = [describe_pair(store, pair, tokenizer) for pair in chosen]
    return shown | {"feature": None, "examples": examples}


def _complete_sites(store: Store) -> list[str]:
    return list(store.sites) if store.meta["state"] == "complete" else []


def _dropped_rows(listed: str) -> list[dict[str, Any]]:
    """By reason the first rows of the list beside the store; [] without a list."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for line in listed.splitlines():
        try:
            row = json.loads(line)
            shown = {name: row[name] for name in ("row", "place", "detail")}
            by_reason.setdefault(str(row["reason"]), []).append(shown)
        except (ValueError, LookupError, TypeError, RecursionError):
            # The list is for people, who may have edited it.
            continue
    return [
        {"reason": reason, "rows": rows[:_SHOWN_ROWS], "listed": len(rows)}
        for reason, rows in by_reason.items()
    ]


def _length_histogram(store: Store) -> dict[str, Any]:
    lengths = np.diff(store.read_array("spans"))
    edges = np.histogram_bin_edges(lengths, _BINS)
    return {
        "edges": edges.tolist(),
        "counts": {
            name: np.histogram(lengths[:, column], edges)[0].tolist()
            for name, column in (("chosen", 1), ("rejected", 2), ("prompt", 0))
        },
    }


def _frequencies(store: Store, site: str) -> dict[str, Any]:
    """How many features fire in what share of the responses, and the shares of both sides.

    Returns:
        edges of shares and the number of features between them, by side, without those that never
        fire; and points of chosen and rejected.
    """
    share = store.frequency(site) / store.scored
    active = share[:, share.sum(0) > 0]
    edges = np.linspace(0, 1, 26)
    places = np.unique(np.round(active / _GRID), axis=1) * _GRID
    return {
        "edges": edges.tolist(),
        "counts": {
            name: np.histogram(active[side], edges)[0].tolist() for side, name in enumerate(SIDES)
        },
        "points": np.round(places, 3).T.tolist(),
    }


def _contrasts(store: Store, tokenizer: Any) -> dict[str, Any]:
    """What `fpo features contrast` gives, by site; {} for a store with too few pairs for it."""
    sites = _complete_sites(store)
    if not sites or store.scored < FEWEST_PAIRS:
        return {}
    style = style_of_responses(store, tokenizer)
    # As the command lists them by default.
    rate, top = ContrastConfig.rate, ContrastConfig.top
    return {site: contrast_store(store, site, style, rate, top) for site in sites}


def _examples_by_margin(store: Store) -> list[int]:
    """Pairs from the smallest margin to the largest; the first ones if none is scored yet."""
    margin = store.read_array("ref/margin")
    missing = np.isin(np.arange(store.pairs) // store.block_size, store.unscored_blocks())
    scored = np.flatnonzero(~missing & np.isfinite(margin))
    if not len(scored):
        return list(range(min(store.pairs, len(_QUANTILES))))
    order = scored[np.argsort(margin[scored], kind="stable")]
    places = [round(share * (len(order) - 1)) for share in _QUANTILES]
    return list(dict.fromkeys(order[places].tolist()))


def write_store_page(shown: dict[str, Any], file: Path) -> None:
    """Write the page.

    Args:
        shown: from `describe_for_page`.
        file: HTML.
    """
    contents = {
        "provenance": "Provenance",
        "data": "Data",
        "lengths": "Lengths",
        "margins": "Margins of the reference",
        **({"features": "Features"} if shown["features"] else {}),
        **({"contrast": "Chosen against rejected"} if shown["contrast"] else {}),
        "examples": "Example pairs",
    }
    write_page(file, "store.html", contents=contents, store=shown, charts=_charts(shown))
    say(f"the page is in {file}")


def _charts(shown: dict[str, Any]) -> dict[str, Any]:
    """The page's charts by name; those of a site by site and name."""
    lengths, margin = shown["length_histogram"], shown["margin"]
    charts: dict[str, Any] = {
        "lengths": histogram(
            lengths["edges"],
            list(lengths["counts"].values()),
            "lengths",
            "Histograms of the lengths of prompts, chosen and rejected responses",
            ("tokens", "pairs"),
        )
    }
    if margin:
        charts["margin"] = histogram(
            margin["histogram"]["edges"],
            [margin["histogram"]["counts"]],
            "margin",
            "Histogram of the reference's margins",
            ("margin (nats per token)", "pairs"),
        )
    for number, site in enumerate(shown["features"]):
        charts[site] = _site_charts(shown, site, f"site-{number}")
    return {
        name: Markup(made) if isinstance(made, str) else {k: Markup(v) for k, v in made.items()}
        for name, made in charts.items()
    }


def _site_charts(shown: dict[str, Any], site: str, name: str) -> dict[str, str]:
    found = shown["frequencies"][site]
    charts = {
        "largest": ranked(
            [feature["mean"] for feature in shown["features"][site]["largest_mean"]],
            f"{name}-largest",
            f"The largest mean activations at {site}, by rank",
            "mean activation",
        ),
        "frequency": histogram(
            found["edges"],
            list(found["counts"].values()),
            f"{name}-frequency",
            f"How many features of {site} fire in what share of responses",
            ("share of responses", "features"),
        ),
        "sides": chosen_against_rejected(
            found["points"],
            f"{name}-sides",
            f"Share of chosen and of rejected responses in which features of {site} fire",
        ),
    }
    if contrast := shown["contrast"].get(site):
        rows = [
            (str(row["feature"]), row["effect"], row["interval"])
            for row in contrast["features"]
            if row["effect"] is not None and row["interval"] is not None
        ]
        charts["effects"] = effects(
            rows,
            f"{name}-effects",
            f"Effect sizes of features of {site} with 95 % intervals",
            "effect size (right: larger in chosen)",
        )
    return charts
