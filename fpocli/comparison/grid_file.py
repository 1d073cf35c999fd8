"""A grid's YAML file -> its sections, with their names and types checked.

out: compare
launch: torchrun --nproc-per-node 4         # starts Python on all GPUs; default: one process
sft: {script: sft.py, model: gemma-2-2b}    # a stage before, whose result is the cache's model
cache: {layer: [0, 25]}                     # settings of fpo cache, or `store: ref.zarr`
stores: s3://bucket/stores                  # where they are made; default: the folder OUT/stores
train: {preset: paper-2b, epochs: 1}        # of fpo train
eval: {reference: sft}                      # of fpo eval; `sft` is the result of that stage
baseline: fpo                               # the runs that others are compared with
runs:                                       # a list makes one run for each of its values
  - {method: reference}                     # the cache's model, measured and not trained
  - method: [dpo, simpo, fpo]
    seed: [0, 1, 2]
  - {method: fpo, at: [[layer_0.resid_post], [layer_0.resid_post, layer_25.resid_post]]}
reports: [table3, figure3]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpocli.comparison.expand import check_names, field_names
from fpocli.comparison.steps import launch_words
from fpocli.config import PRESETS, CacheConfig, EvalConfig, TrainConfig
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_yaml

# Settings that fpo compare sets itself. A file cannot allow remote code.
OWN = {
    "cache": {"out", "join", "repair", "trust_remote_code"},
    "train": {"out", "cache", "trust_remote_code"},
    "eval": {"model", "cache", "out", "json", "trust_remote_code"},
}
_SECTIONS: dict[str, Any] = {
    "out": str, "launch": str, "tflops": (int, float), "sft": dict, "store": str, "stores": str,
    "cache": dict, "train": dict, "eval": dict, "baseline": (str, dict), "runs": list,
    "reports": list,
}  # fmt: skip


@dataclass(frozen=True)
class GridFile:
    """The sections of a grid's file.

    Args:
        path: the file.
        out: the folder of everything.
        launch: the words that start Python, on all GPUs.
        tflops: useful TFLOP/s of one process, for the plan's hours; None for the default.
        sft: settings of the stage before, or None.
        store: a finished store, or None.
        stores: the folder, or the prefix of a bucket, in which stores are made.
        cache, train, evaluation: settings of the commands.
        baseline: a method, or settings, of the runs that others are compared with; or None.
        runs: entries, not expanded yet.
        reports: names of tables and figures.
    """

    path: str
    out: Path
    launch: tuple[str, ...]
    tflops: float | None
    sft: dict[str, Any] | None
    store: str | None
    stores: str
    cache: dict[str, Any]
    train: dict[str, Any]
    evaluation: dict[str, Any]
    baseline: dict[str, Any] | None
    runs: list[Any]
    reports: list[str]


def read_grid_file(path: str, known_reports: tuple[str, ...]) -> GridFile:
    """Read a grid's file.

    Raises:
        UserError: it cannot be read, or has an unknown section, setting or report.
    """
    content = _read(path)
    if unknown := [name for name in content.get("reports", []) if name not in known_reports]:
        raise UserError(
            f"{path} asks for the unknown report {unknown[0]}",
            f"known: {', '.join(known_reports)}",
        )
    if ("store" in content) == bool(content.get("cache")):
        raise UserError(
            f"{path} must have either `store` or `cache`",
            "name a finished store, or the settings of fpo cache",
        )
    baseline = content.get("baseline")
    out = Path(content.get("out", Path(path).stem))
    return GridFile(
        path=path,
        out=out,
        launch=launch_words(content.get("launch", ""), path),
        tflops=content.get("tflops"),
        sft=content.get("sft"),
        store=content.get("store"),
        stores=content.get("stores", str(out / "stores")).rstrip("/"),
        cache=content.get("cache", {}),
        train=_with_preset(content.get("train", {})),
        evaluation=content.get("eval", {}),
        baseline={"method": baseline} if isinstance(baseline, str) else baseline,
        runs=content["runs"],
        reports=content.get("reports", ["all"]),
    )


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
        known = field_names(config) - OWN[section] | ({"preset"} if section == "train" else set())
        check_names(content.get(section, {}), known, f"`{section}` in {path}")
    return content


def _with_preset(train: dict[str, Any]) -> dict[str, Any]:
    if "preset" not in train:
        return train
    name = train["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"the preset {name} is unknown", f"known: {', '.join(PRESETS)}")
    return PRESETS[name] | {key: value for key, value in train.items() if key != "preset"}
