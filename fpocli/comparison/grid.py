"""A grid's YAML file -> the commands for its stores, runs and evaluations.

out: compare
cache: {model: gemma-2-2b, layer: [25]}     # settings of fpo cache, or `store: ref.zarr`
train: {preset: paper-2b, epochs: 1}        # of fpo train
eval: {reference: gemma-2-2b}               # of fpo eval
runs:                                       # lists are multiplied out
  - method: [dpo, simpo, fpo]
    seed: [0, 1, 2]
  - {method: fpo, layer: [[7], [13]], site: [[resid_post], [mlp_out]]}
reports: [table3, figure3]
"""

import dataclasses
import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fpocli.config import PRESETS, CacheConfig, EvalConfig, TrainConfig
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import is_file_name, read_yaml

# Settings that fpo compare sets itself.
_OWN = {
    "cache": {"out", "join", "repair"},
    "train": {"out", "cache"},
    "eval": {"model", "cache", "out", "json"},
}
# A file cannot allow remote code.
_OWN = {section: names | {"trust_remote_code"} for section, names in _OWN.items()}
# Settings of fpo cache that do not change the store's content.
_HOW = {"trust_remote_code", "join", "repair", "drop_non_finite"}
# Most bytes of a folder's name; file systems allow 255.
_LONGEST_NAME = 240
_PROGRAM = (sys.executable, "-m", "fpocli")
_FILES = ("feature_weights", "deepspeed", "generate")
_SECTIONS = {
    "out": str, "launch": str, "store": str, "cache": dict, "train": dict, "eval": dict,
    "runs": list, "reports": list,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: unique in the grid.
        words: the command line, up to the command's name.
        settings: the content of its configuration file.
        result: the file that exists when it is done.
        after: the step whose result it reads, or None.
    """

    name: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    result: Path
    after: "Step | None" = None

    @property
    def files(self) -> dict[str, Path]:
        """Files of the user's that it reads, by the setting that names them."""
        return {name: Path(self.settings[name]) for name in _FILES if self.settings.get(name)}


@dataclass(frozen=True)
class Run:
    """One policy of the grid.

    Args:
        name: made from the settings that the grid varies.
        settings: all settings of its store and training: method, alpha, layer, ...
        folder: of the run.
        train, evaluate: its two commands.
    """

    name: str
    settings: dict[str, Any]
    folder: Path
    train: Step
    evaluate: Step


@dataclass(frozen=True)
class Grid:
    """The content of a grid's file.

    Args:
        out: its folder.
        stores: the caching commands, each store once.
        runs: in the file's order.
        reports: names of tables and figures.
    """

    out: Path
    stores: list[Step]
    runs: list[Run]
    reports: list[str]


def read_grid(path: str, known_reports: tuple[str, ...]) -> Grid:
    """Read and check a grid's file.

    Raises:
        UserError: it cannot be read, or has a setting that no command accepts.
    """
    content = _read(path)
    unknown = [name for name in content.get("reports", []) if name not in known_reports]
    if unknown:
        raise UserError(
            f"{path} asks for the unknown report {unknown[0]}",
            f"known: {', '.join(known_reports)}",
        )
    out = Path(content.get("out", Path(path).stem))
    base = {
        "cache": content.get("cache", {}),
        "train": _with_preset(content.get("train", {})),
        "eval": content.get("eval", {}),
    }
    if ("store" in content) == bool(base["cache"]):
        raise UserError(
            f"{path} must have either `store` or `cache`",
            "name a finished store, or the settings of fpo cache",
        )
    stores: dict[str, Step] = {}
    runs: dict[str, Run] = {}
    for entry in content["runs"]:
        for choice in _multiply(entry, path):
            cached = {name: value for name, value in choice.items() if name in _fields(CacheConfig)}
            if cached and "store" in content:
                raise UserError(
                    f"{path} varies {', '.join(cached)}, but names a finished store",
                    "replace `store` by `cache` with the settings of fpo cache",
                )
            step = None
            if "store" not in content:
                step = _store(out, base["cache"] | cached, path)
                step = stores.setdefault(step.name, step)
            run = _run(out, content, base, choice, step, path)
            if run.name in runs:
                raise UserError(f"{path} has the run {run.name} twice", "list it once in `runs`")
            runs[run.name] = run
    return Grid(out, list(stores.values()), list(runs.values()), content.get("reports", ["all"]))


def _store(out: Path, settings: dict[str, Any], path: str) -> Step:
    """The command that makes a store; runs with the same settings share it."""
    whole = dataclasses.asdict(_make(CacheConfig, settings, f"`cache` in {path}"))
    # Settings that do not change the content are not part of the name.
    whole = {name: value for name, value in whole.items() if name not in _HOW}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    sites = zip(whole["layer"], whole["site"] * len(whole["layer"]), strict=False)
    name = "+".join(f"{layer}.{kind}" for layer, kind in sites) + f"-{digest}"
    file = out / "stores" / f"{name}.zarr"
    settings = settings | {"out": str(file)}
    return Step(f"cache.{name}", (*_PROGRAM, "cache"), settings, file / "zarr.json")


def _run(
    out: Path,
    content: dict[str, Any],
    base: dict[str, dict[str, Any]],
    choice: dict[str, Any],
    store: Step | None,
    path: str,
) -> Run:
    name = _name(choice) or "run"
    if not is_file_name(name) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"{path} has a run with the name {name:.80}, which no folder can have",
            "put a long list of values, or one with unusual characters, into `train`",
        )
    folder = out / "runs" / name
    cache = store.settings["out"] if store else content["store"]
    trained = {key: value for key, value in choice.items() if key not in _fields(CacheConfig)}
    settings = base["train"] | trained | {"cache": cache, "out": str(folder)}
    evaluation = base["eval"] | {
        "model": str(folder), "cache": cache, "out": str(folder / "eval"),
    }  # fmt: skip
    config = _make(TrainConfig, settings, f"`train` of {name} in {path}")
    _make(EvalConfig, evaluation, f"`eval` in {path}")
    sites = dataclasses.asdict(CacheConfig(**store.settings)) if store else {}
    try:
        launch = tuple(shlex.split(content.get("launch", ""))) or _PROGRAM
    except ValueError as error:
        raise UserError(
            f"`launch` in {path} is not a command line: {error}", "check its quotes"
        ) from error
    train = Step(
        f"train.{name}", (*launch, "train"), settings, folder / "final" / "config.json", store
    )
    return Run(
        name=name,
        settings=sites | dataclasses.asdict(config),
        folder=folder,
        train=train,
        evaluate=Step(
            f"eval.{name}", (*_PROGRAM, "eval"), evaluation, folder / "eval" / "eval.json", train
        ),
    )


def _make(config: type, settings: dict[str, Any], where: str) -> Any:
    """A command's config, checked before anything runs."""
    missing = [
        field.name
        for field in dataclasses.fields(config)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in settings
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", "see fpo --help")
    try:
        return config(**settings)
    except UserError as error:
        raise UserError(f"{where}: {error}", error.hint) from error


def _read(path: str) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict) or not content.get("runs"):
        raise UserError(f"{path} has no `runs`", "list them: runs: [{method: [dpo, fpo]}]")
    for name, value in content.items():
        kind = _SECTIONS.get(name)
        if kind is None:
            raise UserError(
                f"{path} has an unknown section {name}", f"known: {', '.join(_SECTIONS)}"
            )
        if not isinstance(value, kind) or "\0" in value:
            raise UserError(
                f"{name} in {path} is not of type {kind.__name__}", "see docs/evaluation.md"
            )
    for section, config in (("cache", CacheConfig), ("train", TrainConfig), ("eval", EvalConfig)):
        known = _fields(config) - _OWN[section] | ({"preset"} if section == "train" else set())
        _check_names(content.get(section, {}), known, f"`{section}` in {path}")
    return content


def _with_preset(train: dict[str, Any]) -> dict[str, Any]:
    if "preset" not in train:
        return train
    name = train["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"the preset {name} is unknown", f"known: {', '.join(PRESETS)}")
    return PRESETS[name] | {key: value for key, value in train.items() if key != "preset"}


def _multiply(entry: Any, path: str) -> list[dict[str, Any]]:
    """All combinations of an entry of `runs`, in which a list stands for alternatives."""
    if not isinstance(entry, dict):
        raise UserError(
            f"an entry of `runs` in {path} is not a mapping of settings", "write {method: fpo}"
        )
    known = _fields(TrainConfig) | _fields(CacheConfig)
    _check_names(entry, known - _OWN["train"] - _OWN["cache"], f"`runs` in {path}")
    several = {name for config in (CacheConfig, TrainConfig) for name in _lists(config)}
    choices = []
    for name, value in entry.items():
        # For a setting that is a list, the alternatives are a list of lists.
        of_lists = isinstance(value, list) and any(isinstance(item, list) for item in value)
        listed = of_lists if name in several else isinstance(value, list)
        choices.append([(name, item) for item in (value if listed else [value])])
    return [dict(choice) for choice in product(*choices)]


def _check_names(content: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(str(name) for name in content if name not in known):
        raise UserError(
            f"{where} sets {', '.join(unknown)}, which is unknown or set by fpo compare itself",
            "see fpo --help",
        )


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _lists(config: type) -> set[str]:
    hints = get_type_hints(config, include_extras=True)
    return {name for name, hint in hints.items() if get_origin(get_args(hint)[0]) is list}


def _name(choice: dict[str, Any]) -> str:
    """Such as method-fpo_layer-0+25_seed-1."""

    def text(value: Any) -> str:
        parts = value if isinstance(value, list) else [value]
        return "+".join(str(part).strip("/").replace("/", "-") for part in parts)

    return "_".join(f"{name}-{text(value)}" for name, value in choice.items())
