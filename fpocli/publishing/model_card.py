"""The card of a trained model: front matter that the hub reads, method, command, results."""

import dataclasses
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fpocli.config import TrainConfig
from fpocli.publishing.text import on_hub, plain, table, versions
from fpocli.report.evaluation_table import evaluation_table
from fpocli.store.reader import Store

_LIBRARIES = ("fpocli", "torch", "transformers", "deepspeed")
# Where a run was and how it was saved: nothing of the model depends on them.
_NOT_SHOWN = ("trust_remote_code", "overwrite")


def model_card(
    settings: TrainConfig, store: Store, results: dict[str, Any] | None, title: str, place: str
) -> str:
    """The text of README.md.

    Args:
        settings: of the run.
        store: that it was trained on.
        results: the content of eval.json, or None.
        title: the model's name, or its repository.
        place: its folder or repository, which serves it.
    """
    about = store.meta
    base = settings.model or about["model"]["source"]
    sites = [site for site in store.sites if site in (settings.at or store.sites)]
    rows: list[tuple[str, Any]] = [
        ("starting weights", base),
        ("reference", f"{about['model']['source']}, weights {about['model']['hash'][:12]}"),
        ("data", f"{store.scored:,} pairs of {about['data']['source']}"),
        ("store", f"fingerprint {about['fingerprint']}, written by {versions(store)}"),
        ("method", settings.method),
        ("reward", settings.reward),
        ("constraint", settings.constraint),
        ("beta", settings.beta),
    ]
    if settings.constraint != "none":
        rows.append(("alpha", settings.alpha))
    if settings.constraint == "features":
        rows.append(("k", settings.k))
        rows += [(site, store.sites[site]["sae"]["source"]) for site in sites]
    return "\n".join(
        [
            f"---\n{_front_matter(settings, store, results, title)}\n---\n",
            f"# {plain(title)}\n",
            f"`{plain(base)}` trained with `{settings.method}` by "
            "fpo (Feature-level Preference Optimization, arXiv 2411.07618).\n",
            table(rows),
            "\n## Command\n",
            f"    {_line(['fpo', 'train', *_flags(settings)])}\n",
            "Versions where this card was written: "
            + ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
            + ".\n",
            *_measured(results),
            "## Use\n",
            f"    {_line(['vllm', 'serve', place])}",
            f"    {_line(['python', 'convert_hf_to_gguf.py', place, '--outfile', 'model.gguf'])}\n",
            "The first is vLLM's, the second is in llama.cpp's repository and takes a folder. The "
            "chat template is in the tokeniser's files. The licence is that of the starting "
            "weights.",
            "",
        ]
    )


def _front_matter(
    settings: TrainConfig, store: Store, results: dict[str, Any] | None, name: str
) -> str:
    base, data = settings.model, on_hub(store, "data")
    if base is None:
        base = on_hub(store, "model")
    elif Path(base).exists():
        base = None
    named: dict[str, Any] = {}
    if results:
        named = {"model_name": name, "eval_results": _for_index(results, store)}
    card = ModelCardData(
        base_model=base,
        datasets=[data] if data else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["fpo", "preference-optimization", settings.method])),
        **named,
    )
    return card.to_yaml()


def _for_index(results: dict[str, Any], store: Store) -> list[EvalResult]:
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


def _measured(results: dict[str, Any] | None) -> list[str]:
    if not results:
        return []
    rows: list[tuple[str, str]] = []
    for group in evaluation_table([results]):
        rows.append((f"**{group['title']}**", ""))
        rows += [(row["quantity"], _number(row)) for row in group["rows"]]
    return [f"## Results\n\n`fpo eval`, split {plain(results.get('split'))}:\n\n{table(rows)}\n"]


def _number(row: dict[str, Any]) -> str:
    found = row["values"][0]
    if found["value"] is None:
        return ""
    error = found["standard_error"]
    return format(found["value"], row["format"]) + (f" ± {error:.4f}" if error else "")


def _line(words: list[str]) -> str:
    """A command on one line of a code block."""
    return " ".join(shlex.join(words).splitlines())


def _flags(settings: TrainConfig) -> list[str]:
    """The flags of a run, without those that have their default."""
    default = TrainConfig(cache=settings.cache, method=settings.method)
    words = []
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        implied = name in ("reward", "constraint") or name in _NOT_SHOWN
        given = name in ("cache", "method")
        if implied or (value == getattr(default, name) and not given):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return words
