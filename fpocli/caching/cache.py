"""fpo cache: tokenise, run the frozen reference and its SAEs once, write the store."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpocli.caching.claims import BlockClaims, OwnBlocks, launch_name
from fpocli.caching.identity import check_distributions, describe_origin, identify
from fpocli.caching.open_store import DROPPED, open_or_create
from fpocli.caching.score_block import ScoredBlock, score_block
from fpocli.config import CacheConfig
from fpocli.data.dropped import DroppedRows, list_non_finite
from fpocli.data.layouts import require_a_pair
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import Source, open_source
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model.language_model import LanguageModel, check_layers, load_model
from fpocli.model.network import choose_device, read_config
from fpocli.model.packing import default_packed_length
from fpocli.scoring.saes import choose_default_saes, load_saes
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.bucket import Bucket
from fpocli.store.bucket_lock import BucketLock
from fpocli.store.place import Folder, Place, place_of
from fpocli.store.reader import Store
from fpocli.store.records import ReferenceValues
from fpocli.store.writer import StoreWriter
from fpocli.system.console import progress, say
from fpocli.system.errors import UserError
from fpocli.system.files import resolve_last_part
from fpocli.system.lock import WriterLock
from fpocli.system.model_folder import ModelFolder, find_model


def cache(config: CacheConfig) -> Store:
    """Write the store of a reference model, or resume one that was interrupted.

    Args:
        config: the settings.

    Returns:
        The complete store.

    Raises:
        UserError: the model, SAE, data or store cannot be used; see its hint.
    """
    # -- flags, data and configurations, before anything large is read ---------------------------
    place = place_of(config.out)
    if isinstance(place, Folder):
        place = Folder(resolve_last_part(config.out))
    config = replace(config, out=str(place.name))
    several = config.join or int(os.environ.get("WORLD_SIZE", "1")) > 1
    starts_over = config.overwrite or config.repair
    if several and starts_over:
        raise UserError(
            "--overwrite and --repair need a process of their own",
            "run the command without torchrun and --join; several processes may resume it",
        )
    sites = [Site(layer, kind) for layer, kind in config.sites]
    if len(set(sites)) < len(sites):
        raise UserError("a site is named twice", "name each --layer once, or with another --site")
    source = open_source(config.data, config.split, config.limit)
    require_a_pair(source, config.strict)
    device = choose_device(config.device)
    trust = config.trust_remote_code
    folder = find_model(config.model, weights=False, trust_remote_code=trust)
    model_config = read_config(folder)
    check_layers(model_config, sites)
    check_distributions(config, model_config)
    if sites and not config.sae:
        config = replace(config, sae=choose_default_saes(folder, model_config, sites))
    folder = find_model(config.model, revision=folder.revision, trust_remote_code=trust)
    if not several:
        StoreWriter.require_replaceable(place)
    # A process that removes blocks holds this name before others can join.
    first = "tokens" if starts_over else None
    with _writing(place, several, launch_name(), join=config.join, first=first) as lock:
        return _cache(config, place, device, folder, model_config, sites, source, lock)


def _writing(
    place: Place, several: bool, run: str | None, **settings: Any
) -> WriterLock | BucketLock:
    """The context in which this process may write a place.

    Raises:
        UserError: it is a bucket, which one process writes, and there are several.
    """
    if not isinstance(place, Bucket):
        return WriterLock(Path(place.name), run, **settings)
    if several:
        raise UserError(
            f"one process at a time writes {place.name}", "run the command without torchrun"
        )
    return BucketLock(place)


def _cache(
    config: CacheConfig,
    place: Place,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    sites: list[Site],
    source: Source,
    lock: WriterLock | BucketLock,
) -> Store:
    """The stage itself, while this process is one of the store's writers."""
    # -- tokeniser, SAEs, and what the store is made from -----------------------------------------
    tokenizer = PairTokenizer(
        folder,
        config.chat_template,
        config.max_length,
        config.max_prompt_length,
        DroppedRows(config.strict),
    )
    encoders = load_saes(list(config.sae), sites, model_config.hidden_size, device)
    identity = identify(config, device, folder, model_config, tokenizer, source, encoders)

    # -- token ids of all pairs, once ------------------------------------------------------------
    with lock.exclusive("tokens"):
        origin = describe_origin(config, encoders)
        store = open_or_create(config, place, identity, origin, tokenizer, source)

    # -- the reference's scores, block by block ---------------------------------------------------
    if store.unscored_blocks():
        model = load_model(folder, sites, getattr(torch, config.dtype), device).eval()
        if store.distributions:
            model.require_vocabulary(store.distributions.vocabulary)
        found = check_against_transformers(model, store.tokens(0))
        kernels = model.kernels(distributions=store.distributions is not None)
        say(
            f"sequences of {_packed_length(config, device):,} tokens on {device}; {kernels}; "
            f"within {found.nats:.1g} nats per token of transformers' eager attention"
        )
        claims: BlockClaims | OwnBlocks
        claims = (
            OwnBlocks(lock, store) if isinstance(lock, BucketLock) else BlockClaims(lock, store)
        )
        _score_blocks(config, store, model, encoders, device, claims)

    # -- every block read back, and the store marked complete --------------------------------------
    with lock.exclusive("finish"):
        store = StoreWriter.open(place)
        if store.meta["state"] != "complete":
            store.finish()
        rows = store.read_array("source_row")[store.non_finite].tolist()
        listed = place.read_beside(DROPPED)
        if (now := list_non_finite(listed, rows)) != listed:
            place.write_beside(DROPPED, now)
    name = place.name
    say(f"{name} is complete: {store.scored:,} pairs. See what is in it: fpo inspect {name}")
    return Store.open(place)


def _score_blocks(
    config: CacheConfig,
    store: StoreWriter,
    model: LanguageModel,
    encoders: dict[str, SparseEncoder],
    device: torch.device,
    claims: BlockClaims | OwnBlocks,
) -> None:
    """Score blocks until none is left, sharing the work with other processes.

    Raises:
        UserError: all blocks that are left were claimed by processes that are lost.
    """

    def write(block: int, scored: ScoredBlock) -> None:
        claims.check_claim(block)
        store.write_block(block, *scored)
        claims.release(block)

    with (
        progress("Scoring pairs with the reference", store.pairs, _pairs_done(store)) as bar,
        # One block is compressed and written while the next is scored.
        ThreadPoolExecutor(1) as writer,
    ):
        written: Future[None] | None = None
        while store.unscored_blocks():
            free = claims.free()
            for block in filter(claims.claim, free):
                bar.advance_to(_pairs_done(store))
                tokens, began = store.tokens(block), time.perf_counter()
                scored = score_block(
                    model,
                    encoders,
                    store,
                    tokens,
                    _packed_length(config, device),
                    bar,
                    drop_non_finite=config.drop_non_finite,
                )
                bar.show(_shown(scored.reference, len(tokens.ids) / (time.perf_counter() - began)))
                # At most one block waits, and an error of the writer stops the scoring.
                if written:
                    written.result()
                written = writer.submit(write, block, scored)
            if written:
                written.result()
                written = None
            if not free:
                claims.wait()
            bar.advance_to(_pairs_done(store))


def _shown(values: ReferenceValues, tokens_per_second: float) -> dict[str, float]:
    """What somebody who waits wants to know of each block: is it as fast as those before, and are
    the numbers sane?"""
    margin = values.margin[np.isfinite(values.margin)]
    shown = {"tokens_per_second": tokens_per_second}
    return shown | ({"margin": float(margin.mean())} if len(margin) else {})


def _pairs_done(store: StoreWriter) -> int:
    return store.pairs - sum(store.block_length(block) for block in store.unscored_blocks())


def _packed_length(config: CacheConfig, device: torch.device) -> int:
    return config.packed_length or default_packed_length(device)
