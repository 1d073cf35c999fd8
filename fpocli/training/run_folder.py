"""The folder of a training run: config.yaml, metrics.jsonl, checkpoints/, final/ and, with LoRA,
adapter/."""

import dataclasses
import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from fpocli.config import LOGITS, TrainConfig
from fpocli.model.language_model import LanguageModel
from fpocli.system.errors import UserError, differences, report_write_errors
from fpocli.system.files import is_empty, remove_folder, replace_text
from fpocli.system.json_yaml import is_finite_number, read_json, read_yaml
from fpocli.system.lock import WriterLock
from fpocli.system.ranks import Ranks, is_first_rank
from fpocli.tracking.trackers import TRACKING
from fpocli.training.checkpoints import newest_checkpoint
from fpocli.training.start import START

# Seconds after which NFS shows a file that another host has written.
_LATE = 65.0


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock a run's folder for the processes of this run; rank 0 holds the lock.

    Yields:
        what all ranks call before they write to it; it raises if the lock is lost.

    Raises:
        UserError: another run is using it.
    """
    with ExitStack() as stack:
        ranks, lock = Ranks.connected(), WriterLock(folder)
        ranks.on_first(lambda: stack.enter_context(lock))
        yield lambda: ranks.on_first(lock.check)


class RunFolder:
    """Creates the folder of a run, or opens it to resume the same run.

    Args:
        settings: of the run.
        fingerprint: of the store, so that a run is not resumed on another store.
        held_out: the same of the store whose pairs are held out; None without --eval-cache.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(
        self, settings: TrainConfig, fingerprint: str, held_out: str | None = None
    ) -> None:
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.final = self.folder / "final"
        self.adapter = self.folder / "adapter"
        self.settings = settings
        self._metrics = self.folder / "metrics.jsonl"
        config = dataclasses.asdict(settings)
        # Allowed on the command line only, so a saved config may not set it.
        del config["trust_remote_code"]
        identity = {name: value for name, value in config.items() if name not in _NOT_IDENTITY}
        identity["store"] = fingerprint
        if held_out:
            identity[_HELD_OUT] = held_out
        if settings.feature_weights and settings.feature_weights != LOGITS:
            identity["feature_weights"] = Path(settings.feature_weights).read_text(encoding="utf-8")
        # Before another rank looks at the folder.
        ranks = Ranks.connected()
        ranks.on_first(lambda: self._open_or_create(config, identity))
        ranks.on_each(self._require_shared)
        self.finished = ranks.of_first((self.final / "config.json").is_file())

    def _open_or_create(self, config: dict[str, Any], identity: dict[str, Any]) -> None:
        known = self.folder / "run.json"
        logged = self._metrics.is_file() and self._metrics.stat().st_size > 0
        begun = logged or newest_checkpoint(self.checkpoints) is not None
        if self.folder.exists() and not is_empty(self.folder):
            if not known.is_file():
                raise UserError(
                    f"{self.folder} exists and is not a run of fpo",
                    "choose another folder with --out",
                )
            if self.settings.overwrite:
                remove_folder(self.folder)
            elif begun and (other := differences(_identity(known, identity), identity)):
                raise UserError(
                    f"{self.folder} holds a run with other settings: {other}",
                    "use the settings of that run to resume it, another --out, or --overwrite",
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not begun:
            # Of a run with other settings, maybe.
            for name in (TRACKING, START):
                (self.folder / name).unlink(missing_ok=True)
        replace_text(known, json.dumps(identity, indent=1))
        replace_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def _require_shared(self) -> None:
        """Refuse a folder of this host alone: its ranks' parts of checkpoints would be lost."""
        late = time.monotonic() + _LATE
        while not (self.folder / "run.json").is_file():
            if time.monotonic() > late:
                raise UserError(
                    f"{self.folder} on {socket.gethostname()} is not the folder of rank 0",
                    "choose --out on a file system that all hosts share",
                )
            time.sleep(0.1)

    def saved(self) -> str:
        """What a later command resumes from, in words."""
        newest = newest_checkpoint(self.checkpoints)
        if newest is None:
            return (
                "no checkpoint has been saved yet, so it will start over; "
                f"--save-every is {self.settings.save_every} steps"
            )
        return f"it will go on after step {newest.name.removeprefix('step-')}"

    def resume_at(self, step: int) -> list[dict[str, Any]]:
        """Remove what was logged after the checkpoint that training resumes from. All ranks must
        call this function.

        Returns:
            the lines of metrics.jsonl up to it.
        """
        ranks = Ranks.connected()
        lines = self._metrics.read_text().splitlines() if self._metrics.is_file() else []
        # Another host may see fewer lines, and all must decide the same.
        kept = ranks.of_first([line for line in lines if step and _step_of(line) <= step])
        ranks.on_first(lambda: self._keep(kept))
        return [json.loads(line) for line in kept]

    def _keep(self, lines: list[str]) -> None:
        for left in self.checkpoints.glob("partial-*"):
            shutil.rmtree(left)
        replace_text(self._metrics, "".join(line + "\n" for line in lines))

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if is_first_rank():
            with self._metrics.open("a") as metrics:
                metrics.write(json.dumps(record) + "\n")

    def save_model(
        self,
        model: LanguageModel,
        weights: dict[str, torch.Tensor],
        tokenizer: Any,
        card: str,
    ) -> None:
        """Write final/ as a plain transformers folder. An adapter is written to adapter/ first, and
        merged into final/.

        Args:
            model, weights, tokenizer: what is written.
            card: the model card.
        """
        if model.adapter:
            with _appearing(self.adapter) as partial:
                model.adapter.save(partial, weights)
            weights = model.adapter.merge(weights)
        with _appearing(self.final) as partial:
            model.network.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Where to write a folder, which gets its name when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with report_write_errors(partial):
        yield partial
    # An adapter of a run that was killed before it wrote its final model.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_run(folder: Path) -> tuple[str, TrainConfig]:
    """The fingerprint of a run's store, and the run's settings.

    Raises:
        UserError: the folder's files are not those of a run of this version.
    """
    settings = read_yaml(folder / "config.yaml")
    try:
        return _object(folder / "run.json")["store"], TrainConfig(**_renamed(settings))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a run of this version of fpo: {error}",
            "train it again, or name its folder final/",
        ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, with their finite numbers; a line that is not complete,
    as of a run that is going on, is left out."""
    file, found = folder / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or row.get("split") not in ("train", "eval"):
            continue
        numbers = {name: value for name, value in row.items() if is_finite_number(value)}
        if "step" in numbers:
            found.append(numbers | {"split": row["split"]})
    return found


def held_out_store(folder: Path) -> str | None:
    """The fingerprint of the store whose pairs a run held out; None without --eval-cache."""
    return _object(folder / "run.json").get(_HELD_OUT)


def recorded_weights(folder: Path) -> str | None:
    """The text of the weights file that a run was trained with; None without one."""
    text = _object(folder / "run.json").get("feature_weights")
    return text if isinstance(text, str) and text != LOGITS else None


def _identity(file: Path, current: dict[str, Any]) -> dict[str, Any]:
    """The identity in run.json. A setting that did not exist yet had today's default."""
    known = _renamed(_object(file))
    method = {"method": known["method"]} if "method" in known else {}
    today = dataclasses.asdict(TrainConfig(cache="unused", **method))
    return {name: value for name, value in today.items() if name in current} | known


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names they have today."""
    return {_NEW_NAMES.get(name, name): value for name, value in settings.items()}


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object", "choose another folder with --out")
    return value


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


# In run.json the fingerprint of the store of --eval-cache.
_HELD_OUT = "eval_store"
# Settings of version 0.1 that have another name now.
_NEW_NAMES = {"tokens_per_row": "packed_length"}
# Where things are and how often they are saved: a resumed run may change these.
_NOT_IDENTITY = (
    "allow", "cache", "out", "overwrite", "sae", "reference", "device", "save_every",
    "keep_checkpoints", "deepspeed", "gpus", "eval_cache", "max_minutes",
    "track",
)  # fmt: skip
