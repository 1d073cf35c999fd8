"""The commands of a grid: SFT, caching, training, evaluation; what each depends on."""

import dataclasses
import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpocli.config import JUDGES, LOGITS, CacheConfig
from fpocli.data.chat_templates import CHAT_TEMPLATES
from fpocli.store.metadata import DOCUMENT, attributes
from fpocli.store.place import place_of
from fpocli.system.errors import UserError

# Settings of fpo cache that do not change the store's content.
_HOW = {"trust_remote_code", "repair", "drop_non_finite", "drop_crashing", "workers", "ray"}
_FPO = ("-m", "fpocli")
# Settings that name files of the user's, and those that may name files or folders.
_FILES = ("feature_weights", "deepspeed", "generate", "chat_template")
_PLACES = ("data", "model", "sae", "reference")


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: unique in the grid.
        words: the command line, up to the command's name.
        settings: the content of its configuration file.
        result: the file that exists when it is done; a store may be in a bucket, see `made`.
        after: the step whose result it reads, or None.
    """

    name: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    result: Path
    after: "Step | None" = None

    @property
    def kind(self) -> str:
        """sft, cache, train or eval."""
        return self.name.partition(".")[0]

    @property
    def made(self) -> bool:
        """Whether its result exists."""
        if self.kind == "cache":
            return place_of(self.settings["out"]).exists(DOCUMENT)
        return self.result.is_file()

    @property
    def files(self) -> dict[str, Path]:
        """Files of the user's that it reads and that must exist, by the setting that names them."""
        named = {
            f"{setting}: {value}": Path(value)
            for setting in _FILES
            for value in self._values(setting)
            if value not in JUDGES and value not in CHAT_TEMPLATES and value != LOGITS
        }
        if self.kind == "sft":
            named["script"] = Path(self.words[-1])
        return named

    def _values(self, setting: str) -> list[str]:
        """A setting's names of files; a deepspeed configuration may stand in the grid itself."""
        value = self.settings.get(setting) or []
        return [one for one in (value if isinstance(value, list) else [value]) if type(one) is str]

    def inputs(self, *, finished: bool = True) -> str:
        """sha256 of everything the result depends on: settings, files, and the steps before; of a
        finished store also its content, which the user may have made again."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for file in self.files.values():
            digest.update(file.read_bytes() if file.is_file() else b"")
        for file in self._large_files():
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
        if self.after:
            digest.update(self.after.inputs().encode())
        if self.kind in ("train", "eval") or (self.kind == "cache" and finished):
            store = place_of(self.settings.get("cache") or self.settings["out"])
            digest.update(str(attributes(store).get("fingerprint", "")).encode())
        if held_out := self.settings.get("eval_cache"):
            digest.update(str(attributes(place_of(held_out)).get("fingerprint", "")).encode())
        return digest.hexdigest()

    def _large_files(self) -> list[Path]:
        """Data and weights of the user's, which are not read to see whether they have changed."""
        made, step = [], self.after
        while step:
            made.append(step.result)
            step = step.after
        named = [Path(value) for setting in _PLACES for value in self._values(setting)]
        own = [place for place in named if not any(place in result.parents for result in made)]
        files = [file for place in own for file in (place, *sorted(place.glob("*")))]
        return [file for file in files if file.is_file()]


def launch_words(launch: str, path: str) -> tuple[str, ...]:
    """The words that start Python on all GPUs; without any, this Python.

    Raises:
        UserError: they are not a command line, or name fpo.
    """
    try:
        words = tuple(shlex.split(launch))
    except ValueError as error:
        raise UserError(
            f"`launch` in {path} is not a command line: {error}", "check its quotes"
        ) from error
    if "fpocli" in words or "fpo" in words:
        raise UserError(
            f"`launch` in {path} names fpo, which fpo compare adds itself",
            "write what starts Python only, such as: torchrun --nproc-per-node 4",
        )
    return words or (sys.executable,)


def processes(launch: tuple[str, ...]) -> int:
    """Number of processes that torchrun's flags name; 1 for other commands."""
    count = 1
    for flag in ("nproc", "nnodes"):
        named = re.search(rf"--{flag}[-_]?(?:per[-_]node)?[ =](\d+)", " ".join(launch))
        count *= int(named[1]) if named else 1
    return count


def sft_step(section: dict[str, Any], out: Path, launch: tuple[str, ...], path: str) -> Step:
    """The stage before: a script beside the grid's file, which takes its settings as TRL's do.

    Args:
        section: of the grid; `script`, and the script's settings.
        out: the grid's folder.
        launch: the words that start Python.
        path: the grid's file.

    Raises:
        UserError: the section names no script or no model.
    """
    settings = dict(section)
    script = settings.pop("script", None)
    for name, value in (("script", script), ("model", settings.get("model"))):
        if not isinstance(value, str) or "\0" in value:
            raise UserError(
                f"`sft` in {path} names no {name}",
                "write script: sft.py and model: google/gemma-2-2b, as in examples/paper",
            )
    try:
        json.dumps(settings, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"`sft` in {path} has a value that is no text or number: {error}", "put it in quotes"
        ) from error
    assert isinstance(script, str)
    settings.setdefault("output_dir", str(out / "sft"))
    result = Path(str(settings["output_dir"])) / "config.json"
    words = (*launch, str(Path(path).parent / script))
    return Step("sft", words, settings, result)


def store_step(
    settings: dict[str, Any], stores: str, launch: tuple[str, ...], after: Step | None
) -> Step:
    """The command that makes a store; runs with the same settings share it.

    Args:
        settings: of fpo cache, without --out.
        stores: the folder, or the prefix of a bucket, of all stores.
        launch: the words that start Python.
        after: the stage that makes the model, or None.
    """
    whole = dataclasses.asdict(CacheConfig(**settings))
    # Settings that do not change the content are not part of the name.
    whole = {name: value for name, value in whole.items() if name not in _HOW}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    sites = [f"{layer}.{kind}" for layer, kind in CacheConfig(**settings).sites]
    # Thirteen sites would be a long name.
    name = "+".join(sites if len(sites) < 4 else [f"{len(sites)}-sites"]) or "no-sites"
    store = f"{stores}/{name}-{digest}.zarr"
    # fpo cache uses all GPUs by itself.
    alone = launch if processes(launch) == 1 else (sys.executable,)
    return Step(
        f"cache.{name}-{digest}",
        (*alone, *_FPO, "cache"),
        settings | {"out": store},
        Path(store) / DOCUMENT,
        after,
    )


def training_step(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    launch: tuple[str, ...],
    store: Step | None,
) -> Step:
    """The command that trains a run."""
    result = folder / "final" / "config.json"
    return Step(f"train.{name}", (*launch, *_FPO, "train"), settings, result, store)


def evaluation_step(
    name: str, settings: dict[str, Any], folder: Path, launch: tuple[str, ...], after: Step | None
) -> Step:
    """The command that evaluates a run, after the one that makes its policy."""
    result = folder / "eval" / "eval.json"
    return Step(f"eval.{name}", (*launch, *_FPO, "eval"), settings, result, after)
