"""What fpo eval measured of a model, for its card: a table, and the shares that the hub lists."""

from typing import Any

from huggingface_hub import EvalResult

from fpocli.display.cards import on_hub, plain, table
from fpocli.report.evaluation_table import evaluation_table
from fpocli.store.reader import Store
from fpocli.system.errors import UserError


def measured_on(results: dict[str, Any], trained_on: Store) -> Store | None:
    """The store that was measured: that of the run, or another; None if it is not found."""
    about = results["store"]
    if about["fingerprint"] == trained_on.meta["fingerprint"]:
        return trained_on
    try:
        store = Store.open(about["path"])
    except UserError:
        return None
    return store if store.meta["fingerprint"] == about["fingerprint"] else None


def figures_of(results: dict[str, Any], store: Store | None) -> list[EvalResult]:
    """The shares that the hub lists beside a model; none if it is unknown of which data they are.

    Args:
        results: the content of eval.json.
        store: that was measured.
    """
    if store is None:
        return []
    data = store.meta["data"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=on_hub(store, "data") or "preference-pairs",
            dataset_name=f"{data['source']}, {results.get('split')} split of the store",
            metric_type=key,
            metric_value=round(results[key]["share"], 4),
            metric_name=key.replace("_", " "),
        )
        for key in ("accuracy", "reward_accuracy")
        if key in results
    ]


def results_section(results: dict[str, Any], store: Store | None) -> str:
    """Their table in Markdown, under a heading.

    Args:
        results: the content of eval.json.
        store: that was measured.
    """
    data = f", of {store.meta['data']['source']}" if store else ""
    where = (
        f"split {results.get('split')} of the store {results['store']['fingerprint'][:12]}{data}"
    )
    rows: list[tuple[str, str]] = []
    for group in evaluation_table([results]):
        rows.append((f"**{group['title']}**", ""))
        rows += [(row["quantity"], _number(row)) for row in group["rows"]]
    return f"## Results\n\n`fpo eval`, {plain(where)}:\n\n{table(rows)}\n"


def _number(row: dict[str, Any]) -> str:
    found = row["values"][0]
    if found["value"] is None:
        return ""
    error = found["standard_error"]
    return format(found["value"], row["format"]) + (f" ± {error:.4f}" if error else "")
