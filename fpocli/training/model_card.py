"""The card of a trained model: front matter that the hub reads, method, command."""

import dataclasses
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fpocli.config import TrainConfig
from fpocli.display.cards import on_hub, plain, table, versions
from fpocli.store.reader import Store
from fpocli.system.model_folder import SHORT_NAMES

_LIBRARIES = ("fpocli", "torch", "transformers", "deepspeed")
# Where a run was and how it was saved: nothing of the model depends on them.
_NOT_SHOWN = ("trust_remote_code", "overwrite")


def model_card(
    settings: TrainConfig,
    store: Store,
    weights_of: str,
    title: str,
    place: str,
    results: str = "",
    figures: list[EvalResult] | None = None,
) -> str:
    """The text of README.md.

    Args:
        settings: of the run.
        store: that it was trained on.
        weights_of: which step, in words.
        title: the model's name, or its repository.
        place: its folder or repository, which serves it.
        results: Markdown about what fpo eval measured.
        figures: those of them that the hub lists.
    """
    about = store.meta
    base = settings.model or about["model"]["source"]
    sites = [site for site in store.sites if site in (settings.at or store.sites)]
    rows: list[tuple[str, Any]] = [
        ("starting weights", base),
        ("reference", f"{about['model']['source']}, weights {about['model']['hash'][:12]}"),
        ("data", f"{store.scored:,} pairs of {about['data']['source']}"),
        ("store", f"fingerprint {about['fingerprint']}, written by {versions(store)}"),
        ("weights of", weights_of),
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
            f"---\n{_front_matter(settings, store, title, figures)}\n---\n",
            f"# {plain(title)}\n",
            f"`{plain(base)}` trained with `{settings.method}` by "
            "fpo (Feature-level Preference Optimization, arXiv 2411.07618).\n",
            table(rows),
            "\n## Command\n",
            f"    {_line(['fpo', 'train', *_flags(settings)])}\n",
            "Versions where this card was written: "
            + ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
            + ".\n",
            *([results] if results else []),
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
    settings: TrainConfig, store: Store, name: str, figures: list[EvalResult] | None
) -> str:
    data = on_hub(store, "data")
    card = ModelCardData(
        base_model=_base_on_hub(settings, store),
        datasets=[data] if data else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["fpo", "preference-optimization", settings.method])),
        model_name=name if figures else None,
        eval_results=figures,
    )
    return card.to_yaml()


def _base_on_hub(settings: TrainConfig, store: Store) -> str | None:
    """The hub's id of the starting weights; None if they were files."""
    if settings.model is None:
        return on_hub(store, "model")
    return (
        None if Path(settings.model).exists() else SHORT_NAMES.get(settings.model, settings.model)
    )


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
