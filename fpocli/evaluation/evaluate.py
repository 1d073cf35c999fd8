"""fpo eval: measure a policy on the pairs of a store, sample from it, write the results."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fpocli.config import EvalConfig, TrainConfig
from fpocli.display.terminal import show_evaluation
from fpocli.evaluation.feature_changes import write_changes
from fpocli.evaluation.measure import Measured, Values, in_order, measure_pairs, write_measurements
from fpocli.evaluation.prompts import load_prompts
from fpocli.evaluation.samples import Samples
from fpocli.evaluation.sampling import generate
from fpocli.evaluation.summary import summarise
from fpocli.evaluation.track import send_evaluation
from fpocli.features.weights import (
    FeatureWeights,
    load_feature_weights,
    parse_feature_weights,
)
from fpocli.model.network import choose_device
from fpocli.model.packing import default_packed_length
from fpocli.scoring.loading import check_k, sites_of, tokenizer_of
from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store
from fpocli.system.console import data_console, say, warn
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.json_yaml import parse_yaml
from fpocli.system.model_folder import ModelFolder, find_model
from fpocli.system.ranks import Ranks, connected_ranks
from fpocli.tracking.trackers import Trackers
from fpocli.training.pair_loader import PairLoader
from fpocli.training.run_folder import held_out_store, read_run, recorded_weights
from fpocli.training.where import pairs_where


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a policy on a store's pairs, sample from it, and write and print the results.

    Args:
        config: the settings.

    Returns:
        the content of eval.json.

    Raises:
        UserError: the model, store, reference or prompts cannot be used.
    """
    with connected_ranks() as ranks:
        with Trackers(config.track, ranks) as trackers:
            result = _evaluate(config, ranks, trackers)
        if ranks.rank == 0:
            _print(result, config)
        return result


def _evaluate(config: EvalConfig, ranks: Ranks, trackers: Trackers) -> dict[str, Any]:
    """The stage itself: every rank measures and samples its share, rank 0 writes the results."""
    prompts = load_prompts(config)
    store = Store.open(locally_cached(config.cache))
    store.require_complete()
    device = choose_device(config.device)
    run = run_folder(config.model)
    folder, trained = find_policy(config, run, store)
    out = Path(config.out or (run / "eval" if run else "eval"))
    if config.track:
        if run is None or trained is None:
            raise UserError(
                f"--track continues the trackers of a run of fpo train, and {config.model} is none",
                "leave it out",
            )
        trackers.open(run, asdict(trained))
    tokenizer = tokenizer_of(store, folder)
    k = config.k or (trained.k if trained else TrainConfig(cache=config.cache).k)
    sites = sites_of(store, config.at or (trained.at if trained else []))
    check_k(store, sites, k)
    groups = _groups(config, run, store)
    loader = PairLoader(
        store,
        batch_size=1,
        packed_length=config.packed_length or default_packed_length(device),
        eval_fraction=_held_out_share(config, run, trained, store),
        seed=0,
        rank=ranks.rank,
        world=ranks.world,
        where=pairs_where(store, trained.where) if trained else None,
        sites=[str(site) for site in sites],
    )
    split = config.split or ("eval" if loader.held_out_pairs else "all")
    if trained and split != "eval":
        warn(f"note: {config.model} may have been trained on pairs of the split {split}")
    if not loader.split_size(split):
        raise UserError(
            f"the split {split} of {store.path} is empty",
            "choose another --split, or hold pairs out with --eval-fraction",
        )
    out.mkdir(parents=True, exist_ok=True)
    # All weights are read for it, so once, and by rank 0, which opens the samples.
    weights = folder.weights_hash() if prompts and ranks.rank == 0 else ""
    answers = [Samples(config, asked, weights, store, out, ranks) for asked in prompts]
    parts = ranks.gather(
        measure_pairs(config, store, folder, loader, sites, split, k, groups, device)
    )
    sampled = generate(config, answers, folder, tokenizer, store, device)
    result = None
    if ranks.rank == 0:
        measured = in_order(parts)
        result = _describe(config, store, folder, trained, split, measured.values, sampled)
        _write(result, measured, out)
        if config.track:
            send_evaluation(trackers, result, measured.changes, answers, out)
    return ranks.of_first(result)


def _held_out_share(
    config: EvalConfig, run: Path | None, trained: TrainConfig | None, store: Store
) -> float:
    """The share of the store's pairs that the policy was not trained on.

    Raises:
        UserError: the run held out the pairs of another store, and held-out pairs are asked for.
    """
    if run is None or trained is None:
        return config.eval_fraction
    if trained.eval_cache is None:
        return trained.eval_fraction
    if held_out_store(run) == store.meta["fingerprint"]:
        return 1.0
    if config.split in (None, "eval"):
        raise UserError(
            f"the run {run} was trained on all pairs of {store.path}, and held out those of "
            f"{trained.eval_cache}",
            "name that store with --cache, or measure the pairs of training with --split train",
        )
    return 0.0


def _groups(config: EvalConfig, run: Path | None, store: Store) -> dict[str, FeatureWeights]:
    """The weights whose groups are measured: those of --feature-weights, or those that the run was
    trained with, whatever the file says today."""
    if config.feature_weights:
        return load_feature_weights(config.feature_weights, store.widths)
    text = recorded_weights(run) if run else None
    if text is None:
        return {}
    where = f"{run}/run.json"
    return parse_feature_weights(parse_yaml(text, where), where, store.widths)


def _describe(
    config: EvalConfig,
    store: Store,
    folder: ModelFolder,
    trained: TrainConfig | None,
    split: str,
    values: Values,
    sampled: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of eval.json."""
    result = {
        "model": folder.source,
        "method": trained.method if trained else None,
        "store": {"path": str(store.path), "fingerprint": store.meta["fingerprint"]},
        "split": split,
        **summarise(values),
    }
    return result | ({"generation": sampled} if config.generate else {})


def _write(result: dict[str, Any], measured: Measured, out: Path) -> None:
    from fpocli.evaluation.charts import draw_evaluation

    write_measurements(out / "pairs.jsonl", measured.values)
    write_changes(out / "features.npz", measured.values["pair"], measured.changes)
    replace_text(out / "eval.json", json.dumps(result, indent=2))
    draw_evaluation(measured.values, out)
    say(f"the results are in {out}")


def _print(result: dict[str, Any], config: EvalConfig) -> None:
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show_evaluation(result, data_console())


def find_policy(
    config: EvalConfig, run: Path | None, store: Store
) -> tuple[ModelFolder, TrainConfig | None]:
    """The model to evaluate, and the settings of its run if it comes from one.

    Args:
        config: names the model.
        run: the folder of its run, or None.
        store: whose pairs are measured.

    Raises:
        UserError: the run has no final model yet or was trained on another store, whose held-out
            pairs are not this one's; or there is no such model.
    """
    # Only as set for this command; the run's config.yaml does not count.
    trust = config.trust_remote_code
    if run is None:
        return find_model(config.model, trust_remote_code=trust), None
    if not (run / "final").is_dir():
        raise UserError(
            f"the run {run} has no final model yet",
            "complete it with the `fpo train` command that began it",
        )
    fingerprint, settings = read_run(run)
    known = (fingerprint, held_out_store(run))
    if store.meta["fingerprint"] not in known and config.split != "all":
        raise UserError(
            f"{run} was trained on another store than {store.path}, so it may have seen "
            "the pairs that would be held out here",
            "name its own store, or measure all pairs with --split all",
        )
    return find_model(str(run / "final"), trust_remote_code=trust), settings


def run_folder(model: str) -> Path | None:
    """The folder of the run that a path names, itself or by its final/; None if it is not a run."""
    path = Path(model)
    for folder in (path, path.parent) if path.name == "final" else (path,):
        if (folder / "run.json").is_file():
            return folder
    return None
