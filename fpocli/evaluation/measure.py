"""Everything that fpo eval measures of each pair.

Shapes: P pairs of a packed sequence, N pairs of the split, M scored tokens, d model width; column 0
is chosen, column 1 rejected.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpocli.config import EvalConfig
from fpocli.evaluation.feature_changes import FeatureChanges, changes_of, join
from fpocli.features.encoder import SparseEncoder
from fpocli.features.kl_bound import operator_norm, squared_change
from fpocli.features.pretrained import load_decoder
from fpocli.features.site import Site
from fpocli.features.weights import FeatureWeights
from fpocli.model.language_model import FrozenReference, LanguageModel, load_model
from fpocli.scoring.loading import find_reference, load_reference
from fpocli.scoring.saes import load_encoders, sae_sources
from fpocli.scoring.score import PairScores, score
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.files import replace_text
from fpocli.system.model_folder import ModelFolder
from fpocli.training.micro_batch import MicroBatch
from fpocli.training.objective import compare_features, distances_of_groups
from fpocli.training.pair_loader import PairLoader

# Arrays of one number per pair, or one per response [N, 2].
Values = dict[str, np.ndarray]


class Measured(NamedTuple):
    """What is measured of P pairs: their numbers, and how their features changed at each site."""

    values: Values
    changes: dict[str, FeatureChanges]


def measure_pairs(
    config: EvalConfig,
    store: Store,
    folder: ModelFolder,
    loader: PairLoader,
    sites: list[Site],
    split: str,
    k: int,
    weights: dict[str, FeatureWeights],
    device: torch.device,
) -> list[Measured]:
    """All measurements of this rank's pairs, in parts; `in_order` puts those of all together."""
    dtype = getattr(torch, store.meta["model"]["dtype"])
    original = (
        find_reference(store, config.reference, trust_remote_code=config.trust_remote_code)
        if config.reference
        else None
    )
    policy = load_model(folder, sites, dtype, device).eval()
    check_against_transformers(policy, store.tokens(0))
    encoders = load_encoders(store, sites, config.sae, policy.config.hidden_size, device)
    reference, norms = None, {}
    if store.distributions:
        policy.require_vocabulary(store.distributions.vocabulary)
    if original:
        reference = load_reference(original, sites, dtype, device)
        policy.require_vocabulary(reference.vocabulary)
        norms = _operator_norms(config, store, sites, policy)
    groups = {site: omega.to(device) for site, omega in weights.items()}
    dtypes = {name: getattr(torch, about["value_dtype"]) for name, about in store.sites.items()}
    parts: list[Measured] = []
    with (
        torch.inference_mode(),
        progress("Scoring pairs", loader.split_size(split) // loader.world) as bar,
    ):
        with_top = store.distributions is not None
        for micro in loader.evaluation(device, split, with_top=with_top):
            # A rank without work gets a pair of weight 0, for collectives that there are none of.
            if micro.pair_weights.any():
                part = _measure(policy, reference, encoders, micro, k, groups, norms, dtypes)
                parts.append(part)
            bar.advance(len(micro.pairs))
    return parts


def in_order(ranks: list[list[Measured]]) -> Measured:
    """The measurements of all ranks, in the store's order."""
    parts = [part for rank in ranks for part in rank]
    values = [part.values for part in parts]
    order = np.argsort(np.concatenate([part["pair"] for part in values]))
    return Measured(
        {name: np.concatenate([part[name] for part in values])[order] for name in values[0]},
        {site: join([part.changes[site] for part in parts], order) for site in parts[0].changes},
    )


def _measure(
    policy: LanguageModel,
    reference: FrozenReference | None,
    encoders: dict[str, SparseEncoder],
    micro: MicroBatch,
    k: int,
    groups: dict[str, FeatureWeights],
    norms: dict[str, float],
    dtypes: dict[str, torch.dtype],
) -> Measured:
    output = reference(micro.batch) if reference else None
    scores = score(policy, encoders, micro.batch, output, micro.top)
    _, distances = compare_features(scores, micro.reference, encoders, k)
    values: dict[str, Tensor] = {
        "tokens": scores.count,
        "logp": scores.logp,
        "ref_logp": micro.reference.logp,
        **{f"distance.{site}": distance for site, distance in distances.items()},
    }
    for name, (unweighted, _) in distances_of_groups(scores, micro.reference, k, groups).items():
        values[f"group.{name}"] = unweighted
    if scores.kl_bound is not None:
        values["kl_of_store"] = scores.kl_bound
    if scores.kl is not None and output is not None:
        values["kl"] = scores.kl
        for site, norm in norms.items():
            change = _changes(scores, output.states[site], encoders[site], site)
            values[f"bound.{site}"] = norm**2 / 2 * change
    changes = {
        site: changes_of(pooled, micro.reference.features[site], dtypes[site])
        for site, pooled in scores.pooled.items()
    }
    arrays = {name: value.double().cpu().numpy() for name, value in values.items()}
    return Measured({"pair": micro.pairs} | arrays, changes)


def _changes(scores: PairScores, states: Tensor, encoder: SparseEncoder, site: str) -> Tensor:
    """sum over positions of ||c_policy - c_reference||^2, [P, 2]."""
    own = scores.states[site]
    other = states.split([len(response) for response in own])
    pairs = zip(own, other, strict=True)
    return torch.stack([squared_change(encoder, *pair) for pair in pairs]).view(-1, 2)


def _operator_norms(
    config: EvalConfig, store: Store, sites: list[Site], policy: LanguageModel
) -> dict[str, float]:
    """M of each site."""
    head = policy.network.get_output_embeddings().weight
    norms = {}
    with progress("Appendix B's operator norm", len(sites)) as bar:
        for site, source in sae_sources(store, sites, config.sae).items():
            norms[site] = operator_norm(head, load_decoder(source, head.device))
            bar.advance()
    return norms


def read_measurements(path: Path) -> Values:
    """The measurements that `write_measurements` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    values = {"pair": np.array([row["pair"] for row in rows])}
    for name in rows[0]:
        if name.endswith("_chosen"):
            sides = (name, name.removesuffix("_chosen") + "_rejected")
            both = [[row[side] for side in sides] for row in rows]
            values[name.removesuffix("_chosen")] = np.array(both)
    return values


def write_measurements(path: Path, values: Values) -> None:
    """Write the measurements as JSON lines, one per pair."""
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
