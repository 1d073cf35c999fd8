"""Measuring a policy on pairs of a store: means while training, and the command fpo eval.

Shapes: P pairs of a row, N pairs of the split; column 0 is chosen, column 1 rejected.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fpocli.config import EvalConfig, TrainConfig
from fpocli.evaluation.sampling import Samples, generate
from fpocli.evaluation.summary import summarise
from fpocli.features.encoder import SparseEncoder, load_decoder
from fpocli.features.kl_bound import operator_norm, squared_change
from fpocli.model.language_model import FrozenReference, LanguageModel, choose_device, load_model
from fpocli.model.packing import default_tokens_per_row
from fpocli.report.terminal import show_evaluation
from fpocli.scoring.loading import (
    check_k,
    find_reference,
    load_encoders,
    load_reference,
    sae_sources,
    sites_of,
    tokenizer_of,
)
from fpocli.scoring.score import PairScores, score
from fpocli.store.reader import Store
from fpocli.system.console import console, progress
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.model_folder import ModelFolder, find_model
from fpocli.training.objective import Means, compare, objective
from fpocli.training.run_folder import read_run
from fpocli.training.stream import MicroBatch, Stream

# Arrays of one number per pair, or one per response [N, 2].
Values = dict[str, np.ndarray]


@torch.no_grad()
def held_out_means(
    model: Any,
    encoders: dict[str, SparseEncoder],
    batches: Iterable[MicroBatch],
    settings: TrainConfig,
    weights: Mapping[str, Tensor],
    reference: Any,
    where: str,
) -> dict[str, float]:
    """Means of the training metrics over batches, of all ranks together.

    Args:
        model: the policy, or an engine around it.
        encoders: an SAE for each site that is compared.
        batches: what to score.
        settings: the method and its scalars.
        weights: per-feature weights of the sites that have them.
        reference: the FrozenReference, or an engine around it; with it, the sequential KL is
            measured too, whatever the method. Or None.
        where: what the batches are, for the error.

    Raises:
        UserError: a mean is not finite.
    """
    model.eval()
    means = Means()
    for micro in batches:
        expected = reference(micro.batch) if reference is not None else None
        scores = score(model, encoders, micro.batch, expected)
        _, metrics = objective(scores, micro.reference, encoders, settings, weights)
        means.add(metrics, micro.weights, micro.pairs)
    return means.result(where)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a policy on a store's pairs, sample from it, and write and print the results.

    Args:
        config: the settings.

    Returns:
        what eval.json holds.

    Raises:
        UserError: the model, store, reference or prompts cannot be used.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("fpo eval runs in one process", "start it without torchrun")
    store = Store.open(config.cache)
    store.require_complete()
    device = choose_device(config.device)
    run = run_folder(config.model)
    folder, trained = find_policy(config, run, store)
    out = Path(config.out or (run / "eval" if run else "eval"))
    tokenizer = tokenizer_of(store, folder)
    k = config.k or (trained.k if trained else TrainConfig(cache=config.cache).k)
    check_k(store, k)
    stream = Stream(
        store,
        batch_size=1,
        tokens_per_row=config.tokens_per_row or default_tokens_per_row(device),
        eval_fraction=trained.eval_fraction if trained else config.eval_fraction,
        seed=0,
        rank=0,
        world=1,
    )
    split = config.split or ("eval" if stream.held_out_pairs else "all")
    if trained and split != "eval":
        console.print(f"note: {config.model} may have been trained on pairs of the split {split}")
    if not stream.split_size(split):
        raise UserError(
            f"the split {split} of {store.path} is empty",
            "name another --split, or hold pairs out with --eval-fraction",
        )
    out.mkdir(parents=True, exist_ok=True)
    samples = Samples(config, folder, store, out) if config.generate else None
    values = _measure(config, store, folder, stream, split, k, device)
    result: dict[str, Any] = {
        "model": folder.source,
        "method": trained.method if trained else None,
        "store": {"path": str(store.path), "fingerprint": store.meta["fingerprint"]},
        "split": split,
        **summarise(values),
    }
    _write_pairs(out / "pairs.jsonl", values)
    if samples:
        result["generation"] = generate(config, samples, folder, tokenizer, store, device)
    replace_text(out / "eval.json", json.dumps(result, indent=2))
    from fpocli.evaluation.charts import draw_evaluation

    draw_evaluation(values, out)
    console.print(f"the results are in {out}")
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show_evaluation(result, Console(highlight=False, markup=False, soft_wrap=True))
    return result


def find_policy(
    config: EvalConfig, run: Path | None, store: Store
) -> tuple[ModelFolder, TrainConfig | None]:
    """The model of a run's folder, with the run's settings; or any model, without.

    Args:
        config: names the model.
        run: its run's folder, if it has one.
        store: whose pairs are measured.

    Raises:
        UserError: the run has no final model yet or was trained on another store, whose held-out
            pairs are not this one's; or there is no such model.
    """
    # The command's own; that of the run's config.yaml is no reason.
    trust = config.trust_remote_code
    if run is None:
        return find_model(config.model, trust_remote_code=trust), None
    if not (run / "final").is_dir():
        raise UserError(
            f"the run {run} has no final model yet",
            "finish it with the `fpo train` command that began it",
        )
    fingerprint, settings = read_run(run)
    if fingerprint != store.meta["fingerprint"] and config.split != "all":
        raise UserError(
            f"the run {run} was trained on another store than {store.path}, so it may have seen "
            "the pairs that would be held out here",
            "name its own store, or take the pairs as they are with --split all",
        )
    return find_model(str(run / "final"), trust_remote_code=trust), settings


def run_folder(model: str) -> Path | None:
    """The run that a path means, by its folder or by its final model."""
    path = Path(model)
    for folder in (path, path.parent) if path.name == "final" else (path,):
        if (folder / "run.json").is_file():
            return folder
    return None


# -- per pair --------------------------------------------------------------------------------------


def _measure(
    config: EvalConfig,
    store: Store,
    folder: ModelFolder,
    stream: Stream,
    split: str,
    k: int,
    device: torch.device,
) -> Values:
    """Everything that is known of the N pairs, in the store's order."""
    dtype = getattr(torch, store.meta["model"]["dtype"])
    sites = sites_of(store)
    original = (
        find_reference(store, config.reference, trust_remote_code=config.trust_remote_code)
        if config.reference
        else None
    )
    policy = load_model(folder, sites, dtype, device).eval()
    encoders = load_encoders(store, config.sae, policy.config.hidden_size, device)
    reference, norms = None, {}
    if original:
        reference = load_reference(original, sites, dtype, device)
        norms = _operator_norms(config, store, policy)
    parts: list[Values] = []
    with (
        torch.inference_mode(),
        progress("Scoring pairs", stream.split_size(split)) as bar,
    ):
        for micro in stream.evaluation(device, split):
            parts.append(_measure_row(policy, reference, encoders, micro, k, norms))
            bar.advance(len(micro.pairs))
    order = np.argsort(np.concatenate([part["pair"] for part in parts]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def _measure_row(
    policy: LanguageModel,
    reference: FrozenReference | None,
    encoders: dict[str, SparseEncoder],
    micro: MicroBatch,
    k: int,
    norms: dict[str, float],
) -> Values:
    expected = reference(micro.batch) if reference else None
    scores = score(policy, encoders, micro.batch, expected)
    _, distances = compare(scores, micro.reference, encoders, k)
    values: dict[str, Tensor] = {
        "tokens": scores.count,
        "logp": scores.logp,
        "ref_logp": micro.reference.logp,
        **{f"distance.{site}": distance for site, distance in distances.items()},
    }
    if scores.kl is not None and expected is not None:
        values["kl"] = scores.kl
        for site, norm in norms.items():
            change = _changes(scores, expected.states[site], encoders[site], site)
            values[f"bound.{site}"] = norm**2 / 2 * change
    return {"pair": micro.pairs} | {name: v.double().cpu().numpy() for name, v in values.items()}


def _changes(scores: PairScores, states: Tensor, encoder: SparseEncoder, site: str) -> Tensor:
    """sum over positions of ||c_policy - c_reference||^2, [P, 2]."""
    own = scores.states[site]
    other = states.split([len(response) for response in own])
    pairs = zip(own, other, strict=True)
    return torch.stack([squared_change(encoder, *pair) for pair in pairs]).view(-1, 2)


def _operator_norms(config: EvalConfig, store: Store, policy: LanguageModel) -> dict[str, float]:
    """M of each site."""
    head = policy.network.get_output_embeddings().weight
    norms = {}
    with progress("Appendix B's operator norm", len(store.sites)) as bar:
        for site, source in sae_sources(store, config.sae).items():
            norms[site] = operator_norm(head, load_decoder(source, head.device))
            bar.advance()
    return norms


def _write_pairs(path: Path, values: Values) -> None:
    lines = []
    for row in range(len(values["pair"])):
        record: dict[str, Any] = {"pair": int(values["pair"][row])}
        for name, array in values.items():
            if name != "pair":
                record |= dict(
                    zip((f"{name}_chosen", f"{name}_rejected"), array[row].tolist(), strict=True)
                )
        lines.append(json.dumps(record) + "\n")
    replace_text(path, "".join(lines))
