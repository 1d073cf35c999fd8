"""Per-pair measurements -> the quantities that the paper reports.

Shapes: N pairs; column 0 is chosen, column 1 rejected.
"""

from typing import Any

import numpy as np
import pandas as pd

from fpocli.scoring.accuracy import Wins, wins


def summarise(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """The quantities of fpo eval.

    Args:
        values: arrays [N, 2]: tokens, logp and ref_logp in nats, distance.SITE, group.NAME, with
            a reference kl in nats and bound.SITE, and with distributions in the store kl_of_store.

    Returns:
        JSON-ready results; docs/evaluation.md defines each.
    """
    tokens, logp = values["tokens"], values["logp"]
    ratio = logp - values["ref_logp"]
    result: dict[str, Any] = {
        "pairs": len(logp),
        **{name: _accuracy(found) for name, found in _accuracies(values).items()},
        "margin_per_token": _gap(logp / tokens),
        "reward_margin": _gap(ratio),
        "reward_margin_per_token": _gap(ratio / tokens),
        "perplexity": _sides(np.exp(-logp.sum(0) / tokens.sum(0))),
    }
    sites = measured_sites(values)
    if sites:
        result["distance"] = {site: _spread(values[f"distance.{site}"]) for site in sites}
    if groups := measured_groups(values):
        result["groups"] = {name: _spread(values[f"group.{name}"]) for name in groups}
    kl = best_kl(values)
    if kl is not None:
        result["kl_from"] = "reference" if "kl" in values else "store"
        result["kl"] = _spread(kl)
        result["kl_per_token"] = _spread(kl / tokens)
        result["consistency"] = {
            site: consistency(values[f"distance.{site}"], kl / tokens) for site in sites
        }
    if "kl" in values:
        result["bound"] = {
            site: _bound(values["kl"], values[f"bound.{site}"], tokens) for site in sites
        }
        if "kl_of_store" in values:
            result["kl_of_store"] = _shortfall(values["kl_of_store"], values["kl"], tokens)
    return result


def best_kl(values: dict[str, np.ndarray]) -> np.ndarray | None:
    """K, [N, 2] nats: measured with the reference, or else its lower bound by the store's
    distributions; None without both."""
    return values.get("kl", values.get("kl_of_store"))


def per_pair(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is compared between runs, for every pair: [N] each.

    Args:
        values: as for `summarise`.

    Returns:
        accuracy, reward_accuracy and reward_accuracy_per_token, 1, one half or 0;
        reward_margin_per_token, nats; and where they were measured chosen, rejected and margin of
        distance (the mean over sites) and kl.
    """
    reward = (values["logp"] - values["ref_logp"]) / values["tokens"]
    found = {name: found.value for name, found in _accuracies(values).items()}
    found["reward_margin_per_token"] = reward[:, 0] - reward[:, 1]
    sites = measured_sites(values)
    kl = best_kl(values)
    both = {"kl": kl}
    both |= {f"group.{name}": values[f"group.{name}"] for name in measured_groups(values)}
    if sites:
        both["distance"] = np.mean([values[f"distance.{site}"] for site in sites], axis=0)
    for name, array in both.items():
        if array is not None:
            found[f"{name}_chosen"], found[f"{name}_rejected"] = array.T
    if kl is not None:
        found["kl_margin"] = np.abs(kl[:, 1] - kl[:, 0])
    if sites:
        margins = [np.abs(np.subtract(*values[f"distance.{site}"].T)) for site in sites]
        found["distance_margin"] = np.mean(margins, axis=0)
    return found


def measured_sites(values: dict[str, np.ndarray]) -> list[str]:
    """The sites at which D was measured."""
    return [name.removeprefix("distance.") for name in values if name.startswith("distance.")]


def measured_groups(values: dict[str, np.ndarray]) -> list[str]:
    """The groups of features whose distance was measured."""
    return [name.removeprefix("group.") for name in values if name.startswith("group.")]


def consistency(one: np.ndarray, other: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Correlations of two quantities [N, 2], Pearson's and Spearman's, over the 2N responses and
    over the N margins (the paper's, without a sign)."""
    margins = [np.abs(values[:, 1] - values[:, 0]) for values in (one, other)]
    return {
        "responses": _correlations(one.ravel(), other.ravel()),
        "margins": _correlations(*margins),
    }


def _accuracies(values: dict[str, np.ndarray]) -> dict[str, Wins]:
    """Which pairs' chosen response is higher, by each of the scores that accuracy is defined by."""
    tokens, logp = values["tokens"], values["logp"]
    average, ratio = logp / tokens, logp - values["ref_logp"]
    size = np.abs(logp) + np.abs(values["ref_logp"])
    # A score, and the magnitude of what it is made of, [N, 2] each.
    scores = {
        "accuracy": (average, np.abs(average)),
        "reward_accuracy": (ratio, size),
        "reward_accuracy_per_token": (ratio / tokens, size / tokens),
    }
    return {
        name: wins(score[:, 0], score[:, 1], magnitude.sum(1))
        for name, (score, magnitude) in scores.items()
    }


def _accuracy(found: Wins) -> dict[str, float | None]:
    """Share of pairs whose chosen response is higher, a tie counting one half, its standard error,
    and the share of ties."""
    return _mean(found.value, "share") | {"ties": float(found.tie.mean())}


def _gap(values: np.ndarray) -> dict[str, float | None]:
    """Mean of chosen minus rejected, and its standard error."""
    return _mean(values[:, 0] - values[:, 1], "mean")


def _mean(values: np.ndarray, name: str) -> dict[str, float | None]:
    count = len(values)
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    return {name: float(values.mean()), "standard_error": error}


def _sides(values: np.ndarray) -> dict[str, float]:
    return {"chosen": float(values[0]), "rejected": float(values[1])}


def _spread(values: np.ndarray) -> dict[str, float]:
    """Means of both sides, of rejected minus chosen, and of its absolute value (the paper's
    margin)."""
    gaps = values[:, 1] - values[:, 0]
    return _sides(values.mean(0)) | {
        "difference": float(gaps.mean()),
        "margin": float(np.abs(gaps).mean()),
    }


def _correlations(one: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    x, y = pd.Series(one), pd.Series(other)
    if x.nunique() < 2 or y.nunique() < 2:
        # Before training all are 0, and no correlation is defined.
        return {"pearson": None, "spearman": None}
    return {"pearson": float(x.corr(y)), "spearman": float(x.rank().corr(y.rank()))}


def _shortfall(bound: np.ndarray, kl: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """By how much the store's lower bound misses the KL: its share of it, the difference per token,
    and the correlations of both per token."""
    total = float(kl.sum())
    return {
        "share": float(bound.sum()) / total if total else None,
        "missed_per_token": float(((kl - bound) / tokens).mean()),
        **consistency(bound / tokens, kl / tokens),
    }


def _bound(kl: np.ndarray, bound: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Appendix B: means per token, and the share of responses whose KL is below the bound."""
    return {
        "kl_per_token": float((kl / tokens).mean()),
        "bound_per_token": float((bound / tokens).mean()),
        "kept": float((kl <= bound).mean()),
    }
