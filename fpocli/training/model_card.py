"""The card of a trained model: front matter that the hub reads, method, command."""

import dataclasses
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fpocli.config import TrainConfig
from fpocli.config.words import words_of
from fpocli.display.cards import on_hub, plain, table, versions
from fpocli.store.reader import Store
from fpocli.training.run_folder import read_metrics
from fpocli.training.start import base_on_hub
from fpocli.training.stopping import BestStep

_LIBRARIES = ("fpocli", "torch", "transformers", "deepspeed")
# Flags that whoever repeats the command should decide on.
_NOT_SHOWN = ("trust_remote_code", "overwrite")


def model_card(
    run: Path,
    settings: TrainConfig,
    store: Store,
    title: str,
    place: str,
    results: str = "",
    figures: list[EvalResult] | None = None,
) -> str:
    """The text of README.md.

    Args:
        run: the run's folder.
        settings: of the run.
        store: that it was trained on.
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
        ("data of the store", f"{store.scored:,} pairs of {about['data']['source']}"),
        ("store", f"fingerprint {about['fingerprint']}, written by {versions(store)}"),
        ("weights of", _step_of(run, settings)),
        ("method", settings.method),
        ("reward", settings.reward),
        ("constraint", settings.constraint),
        ("beta", settings.beta),
    ]
    if settings.constraint in ("features", "kl"):
        rows.append(("alpha at the start" if settings.hold else "alpha", settings.alpha))
    if settings.constraint == "features":
        rows.append(("k", settings.k))
        rows += [(site, store.sites[site]["sae"]["source"]) for site in sites]
    return "\n".join(
        [
            f"---\n{_front_matter(run, settings, store, title, figures)}\n---\n",
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
    run: Path,
    settings: TrainConfig,
    store: Store,
    name: str,
    figures: list[EvalResult] | None,
) -> str:
    data = on_hub(store, "data")
    card = ModelCardData(
        base_model=base_on_hub(run, settings, store),
        datasets=[data] if data else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["fpo", "preference-optimization", settings.method])),
        model_name=name if figures else None,
        eval_results=figures or None,
    )
    return card.to_yaml()


def _step_of(run: Path, settings: TrainConfig) -> str:
    """Which step the final model is of, in words."""
    lines = read_metrics(run)
    best = BestStep(settings, lines)
    last = max((line["step"] for line in lines), default=0)
    return str(best) if best.step else f"step {int(last)}"


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
        words += words_of(name, value)
    return words
