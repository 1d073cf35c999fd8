"""The folder of a training run: config.yaml, metrics.jsonl, checkpoints/ and final/."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from fpocli.config import TrainConfig
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences, writing
from fpocli.system.files import is_empty, remove_folder, replace_text
from fpocli.system.json_yaml import read_json, read_yaml
from fpocli.system.lock import WriterLock
from fpocli.system.ranks import is_first_rank, same_on_all_ranks
from fpocli.training.checkpoints import newest_checkpoint


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this run's processes; the first of them does it.

    Raises:
        UserError: another run is in it.
    """
    with ExitStack() as stack:
        _together(lambda: stack.enter_context(WriterLock(folder)))
        yield


def _together(work: Callable[[], Any]) -> None:
    """Do something on the first process; its error is everybody's."""
    failure: list[UserError | None] = [None]
    if is_first_rank():
        try:
            work()
        except UserError as error:
            failure = [error]
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise same_on_all_ranks(failure[0])


class RunFolder:
    """Opens the folder of a new run, or of the same run that was stopped.

    Args:
        settings: of the run.
        fingerprint: of the store, so that a run is not resumed on another one.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(self, settings: TrainConfig, fingerprint: str) -> None:
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.final = self.folder / "final"
        self.settings = settings
        self._metrics = self.folder / "metrics.jsonl"
        config = dataclasses.asdict(settings)
        identity = {name: value for name, value in config.items() if name not in _PLACE}
        identity["store"] = fingerprint
        if settings.feature_weights:
            identity["feature_weights"] = Path(settings.feature_weights).read_text(encoding="utf-8")
        # On one process, before any other looks.
        _together(lambda: self._claim(config, identity))
        self.finished = (self.final / "config.json").is_file()

    def _claim(self, config: dict[str, Any], identity: dict[str, Any]) -> None:
        known = self.folder / "run.json"
        logged = self._metrics.is_file() and self._metrics.stat().st_size > 0
        begun = logged or newest_checkpoint(self.checkpoints) is not None
        if self.folder.exists() and not is_empty(self.folder):
            if not known.is_file():
                raise UserError(
                    f"{self.folder} exists and is no run of fpo", "give another folder with --out"
                )
            if self.settings.overwrite:
                remove_folder(self.folder)
            elif begun and (other := differences(_object(known), identity)):
                raise UserError(
                    f"{self.folder} holds a run with other settings: {other}",
                    "give the settings of that run to go on with it, another --out, or --overwrite",
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(known, json.dumps(identity, indent=1))
        replace_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def resume_at(self, step: int) -> None:
        """Forget what came after the checkpoint that training goes on from."""
        if not is_first_rank():
            return
        for left in self.checkpoints.glob("partial-*"):
            shutil.rmtree(left)
        lines = self._metrics.read_text().splitlines() if self._metrics.is_file() else []
        kept = [line for line in lines if step and _step_of(line) <= step]
        replace_text(self._metrics, "".join(line + "\n" for line in kept))

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if is_first_rank():
            with self._metrics.open("a") as metrics:
                metrics.write(json.dumps(record) + "\n")

    def save_model(
        self, network: Any, weights: dict[str, torch.Tensor], tokenizer: Any, store: Store
    ) -> None:
        """Write final/ as a plain transformers folder, whole or not at all."""
        partial = self.folder / "final.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with writing(partial):
            network.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(_model_card(self.settings, store))
        partial.rename(self.final)


def read_run(folder: Path) -> tuple[str, TrainConfig]:
    """The fingerprint of a run's store, and the run's settings.

    Raises:
        UserError: the folder's files are not those of a run of this version.
    """
    settings = read_yaml(folder / "config.yaml")
    try:
        return _object(folder / "run.json")["store"], TrainConfig(**settings)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no run of this version of fpo: {error}", "train it again, or name final/"
        ) from error


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object", "give another folder with --out")
    return value


def _step_of(line: str) -> float:
    """The step of a line; beyond all steps for one that a crash tore."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


# Where things are, which a resumed run may change.
_PLACE = (
    "allow", "cache", "out", "overwrite", "sae", "reference", "device", "save_every",
    "keep_checkpoints", "deepspeed", "trust_remote_code",
)  # fmt: skip


def _model_card(settings: TrainConfig, store: Store) -> str:
    base = settings.model or store.meta["model"]["source"]
    data = store.meta["data"]
    rows = "\n".join(
        f"| {name} | {value} |"
        for name, value in dataclasses.asdict(settings).items()
        if name not in _PLACE and value is not None
    )
    tags = ", ".join(dict.fromkeys(["fpo", "preference-optimization", settings.method]))
    sites = ", ".join(f"{site} ({about['sae']['source']})" for site, about in store.sites.items())
    return f"""---
library_name: transformers
base_model: {base}
tags: [{tags}]
---

# {Path(base).name} trained with {settings.method}

Trained with fpo (Feature-level Preference Optimization, arXiv 2411.07618) from `{base}` on
{store.pairs:,} preference pairs of `{data["source"]}`, against a cached reference
`{store.meta["model"]["source"]}` (store {store.meta["fingerprint"][:12]}).

Sites and SAEs: {sites}.

| setting | value |
|---|---|
{rows}
"""
