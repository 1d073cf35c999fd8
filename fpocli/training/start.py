"""The weights that a run with --model starts from: start.json in its folder.

An adapter belongs to the weights that it was trained on, so a run that is resumed must find the
same ones. On the hub they are found by their commit; what was a folder is compared by its hash.
"""

import json
from pathlib import Path
from typing import Any

from fpocli.config import LOGITS, TrainConfig
from fpocli.display.cards import on_hub
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.json_yaml import read_json
from fpocli.system.model_folder import ModelFolder
from fpocli.system.ranks import Ranks

START = "start.json"


def starting_revision(run: Path) -> str | None:
    """The hub's commit of the weights that an earlier command started from; None if there was none,
    or if they were files. All ranks must call this function."""
    return Ranks.connected().of_first(_read(run).get("revision"))


def record_start(run: Path, folder: ModelFolder, settings: TrainConfig) -> None:
    """Write start.json, or compare the starting weights with it; without --model, do nothing. All
    ranks must call this function.

    Args:
        run: the run's folder.
        folder: of the starting weights.
        settings: of the run.

    Raises:
        UserError: the run began with other weights, and depends on them after its first step too.
    """
    if settings.model is not None:
        Ranks.connected().on_first(lambda: _record(run, folder, settings))


def _record(run: Path, folder: ModelFolder, settings: TrainConfig) -> None:
    # A checkpoint has all weights, but for an adapter's and those that feature weights are made of.
    depends = settings.lora_rank is not None or settings.feature_weights == LOGITS
    now = {
        "source": folder.source,
        "revision": folder.revision,
        # Of a commit the weights are always the same.
        "hash": folder.weights_hash() if depends and folder.revision is None else None,
    }
    before = _read(run)
    if before and before.get("hash") != now["hash"]:
        raise UserError(
            f"the weights of --model {settings.model} are not those that {run} started from",
            "bring them back to resume it, or start over with --overwrite",
        )
    replace_text(run / START, json.dumps(now, indent=1))


def base_on_hub(run: Path, settings: TrainConfig, store: Store) -> str | None:
    """The hub's id of the starting weights; None if they were files."""
    if settings.model is None:
        return on_hub(store, "model")
    start = _read(run)
    return start["source"] if start.get("revision") else None


def _read(run: Path) -> dict[str, Any]:
    file = run / START
    found = read_json(file) if file.is_file() else None
    return found if isinstance(found, dict) else {}
