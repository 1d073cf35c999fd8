"""What fpo eval measured of a model, for its card: a table, and the shares that the hub lists."""

from typing import Any

from huggingface_hub import EvalResult

from fpocli.display.cards import on_hub, plain, table
from fpocli.report.evaluation_table import evaluation_table
from fpocli.store.reader import Store
from fpocli.system.errors import UserError


def measured(results: dict[str, Any], trained_on: Store) -> tuple[str, list[EvalResult]]:
    """What a card says of an evaluation, under a heading, and the figures that the hub lists: none
    where the store that was measured is not found, since they are of its data.

    Args:
        results: the content of eval.json.
        trained_on: the store of the run.
    """
    about = results["store"]
    where = f"split {results['split']} of the store {about['fingerprint'][:12]}"
    figures = []
    if store := _find(about, trained_on):
        where += f", of {store.meta['data']['source']}"
        figures = _figures(results, store)
    rows: list[tuple[str, str]] = []
    for group in evaluation_table([results]):
        rows.append((f"**{group['title']}**", ""))
        rows += [(row["quantity"], _number(row)) for row in group["rows"]]
    return f"## Results\n\n`fpo eval`, {plain(where)}:\n\n{table(rows)}\n", figures


def _find(about: dict[str, str], trained_on: Store) -> Store | None:
    """The store of a path and a fingerprint: that of the run, or another."""
    if about["fingerprint"] == trained_on.meta["fingerprint"]:
        return trained_on
    try:
        store = Store.open(about["path"])
    except UserError:
        return None
    return store if store.meta["fingerprint"] == about["fingerprint"] else None


def _figures(results: dict[str, Any], store: Store) -> list[EvalResult]:
    """The shares that the hub shows beside a model."""
    source = store.meta["data"]["source"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=on_hub(store, "data") or "preference-pairs",
            dataset_name=f"{source}, {results['split']} split of the store",
            metric_type=key,
            metric_value=round(results[key]["share"], 4),
            metric_name=key.replace("_", " "),
        )
        for key in ("accuracy", "reward_accuracy")
        if key in results
    ]


def _number(row: dict[str, Any]) -> str:
    found = row["values"][0]
    if found["value"] is None:
        return ""
    error = found["standard_error"]
    return format(found["value"], row["format"]) + (f" ± {error:.4f}" if error else "")
