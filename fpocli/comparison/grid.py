"""The runs and commands of a grid, from the sections of its file, checked before anything runs."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpocli.comparison.expand import expand_entry, field_names, name_of
from fpocli.comparison.grid_file import OWN, GridFile, read_grid_file
from fpocli.comparison.steps import (
    Step,
    evaluation_step,
    sft_step,
    store_step,
    training_step,
)
from fpocli.config import CacheConfig, EvalConfig, TrainConfig, override
from fpocli.scoring.loading import find_model_of
from fpocli.store.place import place_of
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import is_file_name

# The "method" of a run that measures the cache's model as it is.
REFERENCE = "reference"
_LONGEST_NAME = 200  # bytes; file systems allow 255, and other names are made from it


@dataclass(frozen=True)
class Run:
    """One policy of the grid.

    Args:
        name: made from the settings that the grid varies.
        settings: all settings of its store and training: method, alpha, at, ...; of the reference
            those of the store alone, beside method and seed.
        folder: of the run.
        train: the command that trains it; None for the reference, which is not trained.
        evaluate: the command that measures it.
    """

    name: str
    settings: dict[str, Any]
    folder: Path
    train: Step | None
    evaluate: Step

    def has(self, settings: dict[str, Any]) -> bool:
        """Whether it has these settings."""
        return all(self.settings.get(name) == value for name, value in settings.items())


@dataclass(frozen=True)
class Grid:
    """Everything that a grid's file asks for.

    Args:
        file: its sections.
        sft: the stage before, or None.
        stores: the caching commands, each store once.
        runs: in the file's order.
    """

    file: GridFile
    sft: Step | None
    stores: list[Step]
    runs: list[Run]

    @property
    def out(self) -> Path:
        """The folder of everything."""
        return self.file.out

    @property
    def steps(self) -> list[Step]:
        """All commands, in the order in which they run."""
        first = [self.sft] if self.sft else []
        own = [step for run in self.runs for step in (run.train, run.evaluate) if step]
        return [*first, *self.stores, *own]

    def is_baseline(self, run: Run) -> bool:
        """Whether the others are compared with this run."""
        return self.file.baseline is not None and run.has(self.file.baseline)

    def baselines_of(self, run: Run) -> list[Run]:
        """The runs that a run is compared with: of the same seed, and not itself a baseline."""
        if self.is_baseline(run):
            return []
        seed = run.settings["seed"]
        return [own for own in self.runs if self.is_baseline(own) and own.settings["seed"] == seed]


def read_grid(path: str, known_reports: tuple[str, ...]) -> Grid:
    """Read and check a grid's file.

    Raises:
        UserError: it cannot be read, or has a setting that no command accepts.
    """
    file = read_grid_file(path, known_reports)
    sft = sft_step(file.sft, file.out, file.launch, path) if file.sft is not None else None
    if sft:
        file = _start_from(sft, file)
    elif file.evaluation.get("reference") == "sft":
        raise UserError(
            f"`eval` in {path} has the result of `sft` as its reference, and there is no `sft`",
            "name the reference model",
        )
    stores: dict[str, Step] = {}
    runs: dict[str, Run] = {}
    for entry in file.runs:
        for choice in expand_entry(entry, OWN, path):
            store = _store(file, choice, sft)
            if store:
                store = stores.setdefault(store.name, store)
            run = _run(file, choice, store)
            if run.name in runs:
                raise UserError(f"{path} has the run {run.name} twice", "list it once in `runs`")
            runs[run.name] = run
    if not runs:
        raise UserError(f"the `runs` of {path} have no values", "write {method: [dpo, fpo]}")
    grid = Grid(file, sft, list(stores.values()), list(runs.values()))
    _check_baseline(grid)
    return grid


def _start_from(sft: Step, file: GridFile) -> GridFile:
    """Make the SFT stage's result the cache's model, and the evaluation's reference."""
    if file.store is not None or "model" in file.cache:
        raise UserError(
            f"{file.path} has a section `sft` and names a model or store as well",
            "remove it; the cache's model is the result of `sft`",
        )
    model = sft.settings["output_dir"]
    evaluation = file.evaluation
    if evaluation.get("reference") == "sft":
        evaluation = evaluation | {"reference": model}
    return replace(file, cache=file.cache | {"model": model}, evaluation=evaluation)


def _store(file: GridFile, choice: dict[str, Any], sft: Step | None) -> Step | None:
    """The command that makes the store of a run; None if the file names a finished one."""
    varied = {name: value for name, value in choice.items() if name in field_names(CacheConfig)}
    if file.store is None:
        settings = file.cache | varied
        make_config(CacheConfig, settings | {"out": "unused"}, f"`cache` in {file.path}")
        return store_step(settings, file.stores, file.launch, sft)
    if varied:
        raise UserError(
            f"{file.path} varies {', '.join(varied)}, but names a finished store",
            "replace `store` by `cache` with the settings of fpo cache",
        )
    return None


def _run(file: GridFile, choice: dict[str, Any], store: Step | None) -> Run:
    name = name_of(choice) or "run"
    if not is_file_name(name) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"{file.path} has a run with the name {name:.80}, which no folder can have",
            "put what all runs have in common into `train` or `cache`, or shorten its values",
        )
    folder = file.out / "runs" / name
    cache = store.settings["out"] if store else str(file.store)
    # A setting that both commands have is that of fpo cache.
    trained = {key: value for key, value in choice.items() if key not in field_names(CacheConfig)}
    settings = override(file.train, trained) | {"cache": cache, "out": str(folder)}
    untrained = settings.get("method") == REFERENCE
    if untrained:
        # Only to be checked: no command reads them, and sft needs no features.
        settings |= {"method": "sft"}
    config = make_config(TrainConfig, settings, f"`train` of {name} in {file.path}")
    if config.max_minutes is not None:
        raise UserError(
            f"`train` of {name} in {file.path} sets max_minutes, and a grid needs complete runs",
            "leave it out: fpo compare resumes what was stopped",
        )
    sites = _sites(store, cache)
    if sites is not None:
        _check_sites(config.constraint, config.at, sites, f"{name} in {file.path}")
    train = None if untrained else training_step(name, settings, folder, file.launch, store)
    evaluation = _evaluation(file, folder, cache, sites or [], store, config, untrained=untrained)
    described = dataclasses.asdict(config)
    if untrained:
        # Settings that both commands have stay those of training, as in the other runs.
        shared = described.keys() & field_names(CacheConfig)
        described = {name: described[name] for name in shared}
        described |= {"method": REFERENCE, "seed": config.seed}
    of_store = dataclasses.asdict(CacheConfig(**store.settings)) if store else {}
    return Run(
        name=name,
        settings=of_store | described,
        folder=folder,
        train=train,
        evaluate=evaluation_step(name, evaluation, folder, file.launch, train or store),
    )


def _evaluation(
    file: GridFile,
    folder: Path,
    cache: str,
    sites: list[str],
    store: Step | None,
    config: TrainConfig,
    *,
    untrained: bool,
) -> dict[str, Any]:
    """The settings of a run's fpo eval. All runs of a store are measured at the same sites,
    whatever site they were trained at; else D would be compared at different ones."""
    settings = {"at": sites} | file.evaluation
    model = str(folder)
    if untrained:
        # The model of a finished store is the one it was made from.
        model = store.settings["model"] if store else find_model_of(Store.open(cache), "`model`")
        # The pairs that the trained runs hold out.
        settings = {"eval_fraction": config.eval_fraction, "k": config.k} | settings
    # All pairs of the store that --eval-cache names are held out.
    cache = config.eval_cache or cache
    settings |= {"model": model, "cache": cache, "out": str(folder / "eval")}
    measured = make_config(EvalConfig, settings, f"`eval` in {file.path}")
    if sites:
        _check_sites("none", measured.at, sites, f"`eval` in {file.path}")
    return settings


def _sites(store: Step | None, path: str) -> list[str] | None:
    """The sites of a store that will be made, or of a finished one; None if that does not exist
    yet."""
    if store:
        return [f"layer_{layer}.{kind}" for layer, kind in CacheConfig(**store.settings).sites]
    return list(Store.open(path).sites) if place_of(path).exists() else None


def _check_sites(constraint: str, at: list[str], sites: list[str], where: str) -> None:
    if constraint == "features" and not sites:
        raise UserError(
            f"{where} compares features, and the store has none", "name a `layer` in `cache`"
        )
    if absent := [site for site in at if site not in sites]:
        raise UserError(
            f"{where} is at {absent[0]}, which the store does not have",
            f"its sites are {', '.join(sites)}",
        )


def make_config(config: type, settings: dict[str, Any], where: str) -> Any:
    """A command's config, checked before anything runs."""
    missing = [
        field.name
        for field in dataclasses.fields(config)
        if field.default is field.default_factory is dataclasses.MISSING
        and field.name not in settings
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", "see docs/evaluation.md")
    try:
        return config(**settings)
    except UserError as error:
        raise UserError(f"{where}: {error}", error.hint) from error


def _check_baseline(grid: Grid) -> None:
    """Refuse a baseline that names no run, or several runs of the same seed."""
    wanted, path = grid.file.baseline, grid.file.path
    if wanted is None:
        return
    named = ", ".join(map(str, wanted.values()))
    seeds = [run.settings["seed"] for run in grid.runs if grid.is_baseline(run)]
    if not seeds:
        raise UserError(
            f"no run of {path} is the baseline {named}", "name a method, or settings, of `runs`"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"several runs of {path} are the baseline {named}",
            "name more of its settings: baseline: {method: fpo, alpha: 0.5}",
        )
