"""A grid's YAML file -> its content, checked.

out: compare
launch: torchrun --nproc-per-node 4         # starts Python on all GPUs; default: one process
sft: {script: sft.py, model: gemma-2-2b}    # a stage before, whose result is the cache's model
cache: {model: gemma-2-2b, layer: [0, 25]}  # settings of fpo cache, or `store: ref.zarr`
train: {preset: paper-2b, epochs: 1}        # of fpo train
eval: {reference: gemma-2-2b}               # of fpo eval
baseline: fpo                               # the runs that others are compared with
runs:                                       # lists are multiplied out
  - method: [dpo, simpo, fpo]
    seed: [0, 1, 2]
  - {method: fpo, at: [[layer_0.resid_post], [layer_0.resid_post, layer_25.resid_post]]}
reports: [table3, figure3]
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpocli.comparison.alternatives import check_names, field_names, multiply, name_of
from fpocli.comparison.steps import (
    Step,
    evaluation_step,
    launch_words,
    sft_step,
    store_step,
    training_step,
)
from fpocli.config import PRESETS, CacheConfig, EvalConfig, TrainConfig
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import is_file_name, read_yaml

# Settings that fpo compare sets itself. A file cannot allow remote code.
_OWN = {
    "cache": {"out", "join", "repair", "trust_remote_code"},
    "train": {"out", "cache", "trust_remote_code"},
    "eval": {"model", "cache", "out", "json", "trust_remote_code"},
}
_LONGEST_NAME = 240  # bytes; file systems allow 255
_SECTIONS: dict[str, Any] = {
    "out": str, "launch": str, "tflops": (int, float), "sft": dict, "store": str, "cache": dict,
    "train": dict, "eval": dict, "baseline": (str, dict), "runs": list, "reports": list,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One policy of the grid.

    Args:
        name: made from the settings that the grid varies.
        settings: all settings of its store and training: method, alpha, at, ...
        folder: of the run.
        train, evaluate: its two commands.
    """

    name: str
    settings: dict[str, Any]
    folder: Path
    train: Step
    evaluate: Step

    def has(self, settings: dict[str, Any]) -> bool:
        """Whether it has these settings."""
        return all(self.settings.get(name) == value for name, value in settings.items())


@dataclass(frozen=True)
class Grid:
    """The content of a grid's file.

    Args:
        file: the file.
        out: its folder.
        launch: the words that start Python, on all GPUs.
        tflops: useful TFLOP/s of one process, for the plan's hours; None for the default.
        sft: the stage before, or None.
        stores: the caching commands, each store once.
        runs: in the file's order.
        baseline: settings of the runs that others are compared with; None for no comparison.
        reports: names of tables and figures.
    """

    file: str
    out: Path
    launch: tuple[str, ...]
    tflops: float | None
    sft: Step | None
    stores: list[Step]
    runs: list[Run]
    baseline: dict[str, Any] | None
    reports: list[str]

    @property
    def steps(self) -> list[Step]:
        """All commands, in the order in which they run."""
        first = [self.sft] if self.sft else []
        return [*first, *self.stores, *(s for run in self.runs for s in (run.train, run.evaluate))]


def read_grid(path: str, known_reports: tuple[str, ...]) -> Grid:
    """Read and check a grid's file.

    Raises:
        UserError: it cannot be read, or has a setting that no command accepts.
    """
    content = _read(path)
    if unknown := [name for name in content.get("reports", []) if name not in known_reports]:
        raise UserError(
            f"{path} asks for the unknown report {unknown[0]}",
            f"known: {', '.join(known_reports)}",
        )
    out, launch = (
        Path(content.get("out", Path(path).stem)),
        launch_words(content.get("launch", ""), path),
    )
    base = {
        "cache": dict(content.get("cache", {})),
        "train": _with_preset(content.get("train", {})),
        "eval": content.get("eval", {}),
    }
    if ("store" in content) == bool(base["cache"]):
        raise UserError(
            f"{path} must have either `store` or `cache`",
            "name a finished store, or the settings of fpo cache",
        )
    sft = None
    if "sft" in content:
        sft = sft_step(content["sft"], out, launch, path)
        _use_result(sft, base, content, path)
    stores: dict[str, Step] = {}
    runs: dict[str, Run] = {}
    for entry in content["runs"]:
        for choice in multiply(entry, _OWN, path):
            cached = {
                name: value for name, value in choice.items() if name in field_names(CacheConfig)
            }
            if cached and "store" in content:
                raise UserError(
                    f"{path} varies {', '.join(cached)}, but names a finished store",
                    "replace `store` by `cache` with the settings of fpo cache",
                )
            step = None
            if "store" not in content:
                settings = base["cache"] | cached
                make_config(CacheConfig, settings | {"out": "unused"}, f"`cache` in {path}")
                step = store_step(settings, out, launch, sft)
                step = stores.setdefault(step.name, step)
            run = _run(out, launch, content, base, choice, step, path)
            if run.name in runs:
                raise UserError(f"{path} has the run {run.name} twice", "list it once in `runs`")
            runs[run.name] = run
    return Grid(
        file=path,
        out=out,
        launch=launch,
        tflops=content.get("tflops"),
        sft=sft,
        stores=list(stores.values()),
        runs=list(runs.values()),
        baseline=_baseline(content, list(runs.values()), path),
        reports=content.get("reports", ["all"]),
    )


def _use_result(
    sft: Step, base: dict[str, dict[str, Any]], content: dict[str, Any], path: str
) -> None:
    """Make the SFT stage's result the cache's model, and the evaluation's reference."""
    if "store" in content or "model" in base["cache"]:
        raise UserError(
            f"{path} has a section `sft` and names a model or store as well",
            "remove `model` from `cache`; the model is the result of `sft`",
        )
    base["cache"]["model"] = sft.settings["output_dir"]
    if base["eval"].get("reference") == "sft":
        base["eval"] = base["eval"] | {"reference": sft.settings["output_dir"]}


def _run(
    out: Path,
    launch: tuple[str, ...],
    content: dict[str, Any],
    base: dict[str, dict[str, Any]],
    choice: dict[str, Any],
    store: Step | None,
    path: str,
) -> Run:
    name = name_of(choice) or "run"
    if not is_file_name(name) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"{path} has a run with the name {name:.80}, which no folder can have",
            "put a long list of values, or one with unusual characters, into `train`",
        )
    folder = out / "runs" / name
    cache = store.settings["out"] if store else content["store"]
    # At the same sites for all runs, whatever site they were trained at; else D would be compared
    # at different ones.
    sites = _sites(store, cache)
    trained = {key: value for key, value in choice.items() if key not in field_names(CacheConfig)}
    settings = base["train"] | trained | {"cache": cache, "out": str(folder)}
    evaluation = {"at": sites} | base["eval"] | {
        "model": str(folder), "cache": cache, "out": str(folder / "eval"),
    }  # fmt: skip
    config = make_config(TrainConfig, settings, f"`train` of {name} in {path}")
    make_config(EvalConfig, evaluation, f"`eval` in {path}")
    of_store = dataclasses.asdict(CacheConfig(**store.settings)) if store else {}
    known = store is not None or Path(cache).exists()
    if known and config.method == "fpo" and not sites:
        raise UserError(
            f"{name} in {path} compares features, and the store has none",
            "name a `layer` in `cache`",
        )
    if known and (absent := [site for site in config.at if site not in sites]):
        raise UserError(
            f"{name} in {path} is at {absent[0]}, which the store does not have",
            f"its sites are {', '.join(sites)}",
        )
    train = training_step(name, settings, folder, launch, store)
    return Run(
        name=name,
        settings=of_store | dataclasses.asdict(config),
        folder=folder,
        train=train,
        evaluate=evaluation_step(name, evaluation, folder, launch, train),
    )


def _sites(store: Step | None, path: str) -> list[str]:
    """The sites of a store that will be made, or of a finished one."""
    if store:
        return [f"layer_{layer}.{kind}" for layer, kind in CacheConfig(**store.settings).sites]
    return list(Store.open(path).sites) if Path(path).exists() else []


def make_config(config: type, settings: dict[str, Any], where: str) -> Any:
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


def _baseline(content: dict[str, Any], runs: list[Run], path: str) -> dict[str, Any] | None:
    named = content.get("baseline")
    if named is None:
        return None
    wanted = {"method": named} if isinstance(named, str) else named
    seeds = [run.settings["seed"] for run in runs if run.has(wanted)]
    if not seeds:
        raise UserError(
            f"no run of {path} is the baseline {named}", "name a method, or settings, of `runs`"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"several runs of {path} are the baseline {named}",
            "name more of its settings: baseline: {method: fpo, alpha: 0.5}",
        )
    return wanted


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
        null = isinstance(value, str) and "\0" in value
        if not isinstance(value, kind) or isinstance(value, bool) or null:
            names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
            raise UserError(
                f"{name} in {path} is not of type {' or '.join(names)}", "see docs/evaluation.md"
            )
    for section, config in (("cache", CacheConfig), ("train", TrainConfig), ("eval", EvalConfig)):
        known = field_names(config) - _OWN[section] | ({"preset"} if section == "train" else set())
        check_names(content.get(section, {}), known, f"`{section}` in {path}")
    return content


def _with_preset(train: dict[str, Any]) -> dict[str, Any]:
    if "preset" not in train:
        return train
    name = train["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"the preset {name} is unknown", f"known: {', '.join(PRESETS)}")
    return PRESETS[name] | {key: value for key, value in train.items() if key != "preset"}
