"""The held-out pairs: those of the store itself or of another one, and their training metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fpocli.config import TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.features.weights import FeatureWeights
from fpocli.model.packing import default_packed_length
from fpocli.scoring.score import score
from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences
from fpocli.system.ranks import Ranks
from fpocli.training.first_step import check_store_serves
from fpocli.training.means import Means
from fpocli.training.micro_batch import MicroBatch
from fpocli.training.objective import objective, shares_of_groups
from fpocli.training.pair_loader import PairLoader
from fpocli.training.where import pairs_where


@torch.no_grad()
def held_out_means(
    model: Any,
    encoders: dict[str, SparseEncoder],
    batches: Iterable[MicroBatch],
    settings: TrainConfig,
    weights: Mapping[str, FeatureWeights],
    reference: Any,
    where: str,
    alpha: float | None = None,
) -> dict[str, float]:
    """Means of the training metrics over batches, of all ranks together.

    Args:
        model: the policy, or an engine around it.
        encoders: an SAE for each site that is compared.
        batches: what to score.
        settings: the method and its scalars.
        weights: weights of single features, of the sites that have them.
        reference: the FrozenReference, or an engine around it, to measure the sequential KL
            exactly; or None.
        where: which pairs these are, for the error.
        alpha: weight of the constraint; None is that of the settings.

    Raises:
        UserError: a mean is non-finite.
    """
    model.eval()
    means = Means()
    for micro in batches:
        output = reference(micro.batch) if reference is not None else None
        scores = score(model, encoders, micro.batch, output, micro.top)
        _, metrics = objective(scores, micro.reference, encoders, settings, weights, alpha)
        means.add(metrics, micro.pair_weights, micro.pairs)
    return shares_of_groups(means.result(where))


def open_held_out_store(store: Store, settings: TrainConfig) -> Store | None:
    """The store of --eval-cache, if its reference values mean what those of the other store mean.

    Args:
        store: of the training pairs.
        settings: of the run.

    Raises:
        UserError: the reference, its tokeniser, SAEs or distributions are others, or the store
            cannot serve the method.
    """
    if settings.eval_cache is None:
        return None
    other = Store.open(locally_cached(settings.eval_cache))
    check_store_serves(other, settings)
    sites = settings.at or list(store.sites)
    there, here = (_compared(one, sites, settings) for one in (other, store))
    if different := differences(there, here):
        raise UserError(
            f"the pairs of --eval-cache {other.path} cannot be compared with those of "
            f"{store.path}: {different}",
            "cache them with the same reference, SAEs and distributions",
        )
    return other


def _compared(store: Store, sites: list[str], settings: TrainConfig) -> dict[str, Any]:
    """What two stores of a run must have in common."""
    meta = store.meta
    same: dict[str, Any] = {
        "model": meta["model"]["hash"],
        "in 4 bits": store.in_4bit,
        "vocabulary": meta["tokenizer"]["vocabulary"],
        "chat template": meta["tokenizer"]["chat_template"]["text"],
    }
    if settings.constraint == "features":
        same["SAE"] = {
            site: store.sites[site]["sae"]["hash"] for site in sites if site in store.sites
        }
    if (settings.needs_kl or settings.measure_kl) and not settings.exact_kl:
        same["distributions"] = meta.get("distributions")
    return same


def open_loaders(
    settings: TrainConfig,
    store: Store,
    other: Store | None,
    sites: list[Site],
    device: torch.device,
) -> tuple[PairLoader, PairLoader]:
    """The loader of the training pairs, and that of the held-out ones.

    Args:
        settings: of the run.
        store: of the training pairs.
        other: the store of --eval-cache, all of whose pairs are held out; or None.
        sites: whose features are compared.
        device: where the policy runs.
    """

    def load(store: Store, held_out: float, where: str | None = None) -> PairLoader:
        return PairLoader(
            store,
            batch_size=settings.batch_size,
            packed_length=settings.packed_length or default_packed_length(device),
            eval_fraction=held_out,
            seed=settings.seed,
            rank=Ranks.connected().rank,
            world=Ranks.connected().world,
            sites=[str(site) for site in sites],
            where=pairs_where(store, where),
        )

    loader = load(store, settings.eval_fraction, settings.where)
    return loader, load(other, 1.0) if other else loader
