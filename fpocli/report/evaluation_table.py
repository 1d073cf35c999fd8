"""The results of fpo eval of several runs, as one table."""

from typing import Any

Results = list[dict[str, Any] | None]
# Title and key in eval.json of the quantities with a standard error.
_SHARES = {
    "accuracy, log-probability per token": "accuracy",
    "accuracy, implicit reward": "reward_accuracy",
    "accuracy, reward per token": "reward_accuracy_per_token",
}
_MEANS = {
    "margin, nats per token": "margin_per_token",
    "reward margin, nats": "reward_margin",
    "reward margin, nats per token": "reward_margin_per_token",
}
_SIDES = {"chosen": "chosen", "rejected": "rejected", "|rejected − chosen|": "margin"}
_SAMPLED = {
    "answers": "responses",
    "tokens of an answer": "tokens",
    "share that ended by itself": "ended",
    "entropy, nats per token": "entropy",
    "distinct-1": "distinct_1",
    "distinct-2": "distinct_2",
    "distinct-3": "distinct_3",
}


def evaluation_table(results: Results) -> list[dict[str, Any]]:
    """Every quantity that one of the evaluations has.

    Args:
        results: contents of eval.json by run; None for a run that is not evaluated.

    Returns:
        groups with a `title` and `rows`: `quantity`, `format` and by run `values`, each with
        `value` and `standard_error`, numbers or None.
    """
    sides = {name: key for name, key in _SIDES.items() if key != "margin"}
    groups = [
        _group("Pairs", {"pairs": "pairs"}, results, form=","),
        _group("Accuracy", _SHARES, results, of="share", form=".4f"),
        _group("Margins", _MEANS, results, of="mean", form=".4f"),
        _group("Perplexity", sides, results, "perplexity"),
    ]
    for site in dict.fromkeys(site for one in results for site in (one or {}).get("distance", {})):
        title = f"Distance D at {site}, SAE unit²"
        groups.append(_group(title, _SIDES, results, "distance", site))
    for name in dict.fromkeys(name for one in results for name in (one or {}).get("groups", {})):
        groups.append(_group(f"D of the group {name}, SAE unit²", _SIDES, results, "groups", name))
    for unit, key in (("nats", "kl"), ("nats per token", "kl_per_token")):
        groups.append(_group(f"Sequential KL, {unit}", _SIDES, results, key))
    groups += _sampled(results)
    return [group for group in groups if group["rows"]]


def _sampled(results: Results) -> list[dict[str, Any]]:
    """A group for each set of prompts and temperature."""
    by_run: list[dict[str, Any]] = []
    for result in results:
        found = {}
        for about in (result or {}).get("generation", []):
            temperature = about["temperature"]
            at = "of each category" if temperature is None else f"{temperature:g}"
            found[f"Answers to {about['prompts']}, temperature {at}"] = about
        by_run.append(found)
    return [
        _group(title, _SAMPLED, [found.get(title) for found in by_run])
        for title in dict.fromkeys(title for found in by_run for title in found)
    ]


def _group(
    title: str,
    quantities: dict[str, str],
    results: Results,
    *path: str,
    of: str | None = None,
    form: str = ".4g",
) -> dict[str, Any]:
    """The rows of quantities that are at a path of the results. With `of`, each is a value of that
    name with its standard error."""
    rows = []
    for quantity, key in quantities.items():
        cells = [
            {
                "value": _get(result, *path, key, *([of] if of else [])),
                "standard_error": _get(result, *path, key, "standard_error"),
            }
            for result in results
        ]
        if any(cell["value"] is not None for cell in cells):
            rows.append({"quantity": quantity, "format": form, "values": cells})
    return {"title": title, "rows": rows}


def _get(result: Any, *path: str) -> float | None:
    """The number at a path, None if it is not there."""
    for name in path:
        result = result.get(name) if isinstance(result, dict) else None
    return result if isinstance(result, (int, float)) else None
