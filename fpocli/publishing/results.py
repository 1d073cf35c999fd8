"""What fpo eval measured of a model, for its card: a table, and the shares that the hub lists."""

from typing import Any

from huggingface_hub import EvalResult

from fpocli.display.cards import on_hub, plain, table
from fpocli.report.evaluation_table import evaluation_table
from fpocli.store.reader import Store


def figures_of(results: dict[str, Any], store: Store) -> list[EvalResult]:
    """The shares that the hub shows beside a model."""
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


def results_section(results: dict[str, Any]) -> str:
    """Their table in Markdown, under a heading."""
    rows: list[tuple[str, str]] = []
    for group in evaluation_table([results]):
        rows.append((f"**{group['title']}**", ""))
        rows += [(row["quantity"], _number(row)) for row in group["rows"]]
    return f"## Results\n\n`fpo eval`, split {plain(results.get('split'))}:\n\n{table(rows)}\n"


def _number(row: dict[str, Any]) -> str:
    found = row["values"][0]
    if found["value"] is None:
        return ""
    error = found["standard_error"]
    return format(found["value"], row["format"]) + (f" ± {error:.4f}" if error else "")
