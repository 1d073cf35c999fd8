"""fpo export: the card of a trained model or of a store is written, and both may be pushed."""

import shutil
from pathlib import Path

from fpocli.config import ExportConfig, TrainConfig
from fpocli.evaluation.evaluate import run_folder
from fpocli.publishing.hub import push
from fpocli.publishing.results import measured
from fpocli.publishing.store_card import store_card
from fpocli.report.runs import read_evaluation
from fpocli.store.metadata import DOCUMENT
from fpocli.store.place import Folder, place_of
from fpocli.store.reader import Store
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.files import is_empty, replace_text
from fpocli.training.model_card import model_card
from fpocli.training.run_folder import read_run

_CARD = ".README.md"


def export(config: ExportConfig) -> Path:
    """Write a card, and push what it is of to the hub if a repository is named.

    Args:
        config: the settings.

    Returns:
        the model's folder, or the store's card.

    Raises:
        UserError: there is no finished run and no complete store, the run's store is not found, or
            the hub refuses or cannot be reached.
    """
    run = run_folder(config.source)
    if run is None and not place_of(config.source).exists(DOCUMENT):
        raise UserError(
            f"{config.source} is neither a run of fpo train nor a store", "check the path"
        )
    return _export_store(config) if run is None else _export_run(config, run)


def _export_run(config: ExportConfig, run: Path) -> Path:
    final = run / "final"
    if not final.is_dir():
        raise UserError(
            f"the run {run} has no final model yet",
            "complete it with the `fpo train` command that began it",
        )
    fingerprint, settings = read_run(run)
    store = _store_of(config, settings, run, fingerprint)
    folder = _copied(final, Path(config.out)) if config.out else final
    title = config.push_to_hub or (folder if config.out else run.resolve()).name
    evaluated = run / "eval"
    found = read_evaluation(evaluated) if (evaluated / "eval.json").is_file() else None
    results = measured(found, store) if found else ()
    card = model_card(run, settings, store, title, config.push_to_hub or str(folder), *results)
    replace_text(folder / "README.md", card)
    say(f"the model with its card is in {folder}")
    if config.push_to_hub:
        push(folder, config.push_to_hub, "model", private=config.private)
    return folder


def _store_of(config: ExportConfig, settings: TrainConfig, run: Path, fingerprint: str) -> Store:
    name = config.cache or settings.cache
    try:
        store = Store.open(name)
    except UserError as error:
        raise UserError(
            f"the store of {run} is needed for the card: {error}",
            "name its new place with --cache",
        ) from error
    if store.meta["fingerprint"] != fingerprint:
        raise UserError(
            f"{name} is not the store that {run} was trained on", "name that with --cache"
        )
    return store


def _copied(final: Path, out: Path) -> Path:
    """A copy of a model's folder, which appears complete."""
    if out.exists() and not is_empty(out):
        raise UserError(
            f"{out} exists already", "choose another --out; without it the card is updated in place"
        )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(final, partial)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return out


def _export_store(config: ExportConfig) -> Path:
    if config.out or config.cache:
        raise UserError(
            f"{config.source} is not a run of fpo train, and --out and --cache are for runs",
            "name the folder of a run, or leave them out to write the card of a store",
        )
    store = Store.open(config.source)
    store.require_complete()
    place, name = store.place, Path(str(store.path)).name
    card = store_card(store, config.push_to_hub, name)
    # Beside the store: inside of it zarr would warn of a file that is none of its own.
    place.write_beside(_CARD, card)
    say(f"the store's card is {place.beside(_CARD)}")
    if config.push_to_hub:
        if not isinstance(place, Folder):
            raise UserError(
                f"{store.path} is in a bucket, and what is pushed must be in a folder",
                "copy the store to a folder first",
            )
        push(place.path, config.push_to_hub, "dataset", inside=name, card=card,
             private=config.private)  # fmt: skip
    return Path(place.beside(_CARD))
