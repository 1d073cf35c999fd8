"""fpo cache: tokenise, run the frozen reference and its SAEs once, write the store."""

import importlib.util
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpocli.caching.block_scorer import BlockScorer
from fpocli.caching.identity import check_distributions, describe_origin, identify
from fpocli.caching.imported import ImportedReference
from fpocli.caching.on_ray import RayWorkers
from fpocli.caching.open_store import DROPPED, open_or_create
from fpocli.caching.score_block import NON_FINITE, ScoredBlock
from fpocli.config import CacheConfig
from fpocli.data.dropped import DroppedRows, list_non_finite
from fpocli.data.layouts import require_a_pair
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import Source, sources_of
from fpocli.data.token_rows import with_token_ids
from fpocli.features.site import Site
from fpocli.model.four_bit import require_bitsandbytes
from fpocli.model.language_model import check_layers
from fpocli.model.network import choose_device, read_config
from fpocli.scoring.saes import choose_default_saes, load_saes
from fpocli.store.bucket import Bucket
from fpocli.store.bucket_lock import BucketLock
from fpocli.store.place import Folder, Place, place_of
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.store.writer import StoreWriter
from fpocli.system.bar import Bar
from fpocli.system.console import progress, say, warn
from fpocli.system.errors import UserError
from fpocli.system.files import resolve_last_part
from fpocli.system.lock import WriterLock
from fpocli.system.model_folder import ModelFolder, find_model
from fpocli.system.owner import OwnerLock
from fpocli.system.ray_connection import connected_ray

# Threads that compress and write the blocks of Ray's workers; each holds one in memory.
_WRITERS_ON_RAY = 4


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "fpo cache starts its processes itself, and a launcher has started this one",
            "run it by itself, with --workers N for N processes",
        )
    if config.load_in_4bit:
        require_bitsandbytes()
    place = place_of(config.out)
    if isinstance(place, Folder):
        place = Folder(resolve_last_part(config.out))
    config = replace(config, out=str(place.name))
    sites = [Site(layer, kind) for layer, kind in config.sites]
    if len(set(sites)) < len(sites):
        raise UserError("a site is named twice", "name each --layer once, or with another --site")
    sources = sources_of(config)
    imported = ImportedReference(config) if config.reference_logps else None
    if imported:
        sources = [with_token_ids(source) for source in sources]
    require_a_pair(sources, config.strict)
    trust = config.trust_remote_code
    folder = find_model(config.model, weights=False, trust_remote_code=trust)
    model_config = read_config(folder)
    check_layers(model_config, sites)
    check_distributions(config, model_config)
    if sites and not config.sae:
        config = replace(config, sae=choose_default_saes(folder, model_config, sites))
    folder = find_model(config.model, revision=folder.revision, trust_remote_code=trust)
    StoreWriter.require_replaceable(place)
    with ExitStack() as stack:
        lock: OwnerLock = (
            BucketLock(place) if isinstance(place, Bucket) else WriterLock(Path(place.name))
        )
        stack.enter_context(lock)
        workers = None
        if _has_workers(config):
            ray = stack.enter_context(connected_ray(config.ray, config.workers))
            workers = RayWorkers(ray, config)
        return _cache(config, place, folder, model_config, sites, sources, imported, lock, workers)


def _has_workers(config: CacheConfig) -> bool:
    """Whether Ray's workers score the blocks, and not this process: with the flags of Ray, and
    where there are several GPUs and none is named."""
    if config.reference_logps:
        return False
    if config.ray or config.workers:
        return config.ray is not None or config.workers != 1
    gpus = torch.cuda.device_count() if config.device in (None, "cuda") else 0
    if gpus > 1 and not importlib.util.find_spec("ray"):
        say(f'one of {gpus} GPUs is used; for all of them: pip install "fpocli[ray]"')
        return False
    return gpus > 1


def _cache(
    config: CacheConfig,
    place: Place,
    folder: ModelFolder,
    model_config: Any,
    sites: list[Site],
    sources: list[Source],
    imported: ImportedReference | None,
    lock: OwnerLock,
    workers: RayWorkers | None,
) -> Store:
    """The stage itself, while this process is the store's writer."""
    # -- tokeniser, SAEs, and what the store is made from -----------------------------------------
    tokenizer = PairTokenizer(
        folder,
        config.chat_template,
        config.max_length,
        config.max_prompt_length,
        DroppedRows(config.strict),
    )
    device = workers.device if workers else choose_device(config.device)
    # Where workers score, this process only describes the SAEs.
    on = torch.device("cpu") if workers else device
    encoders = load_saes(list(config.sae), sites, model_config.hidden_size, on)
    origin_of_logps = imported.identity if imported else None
    identity = identify(
        config, device, folder, model_config, tokenizer, sources, encoders, origin_of_logps
    )

    # -- token ids of all pairs, once ------------------------------------------------------------
    origin = describe_origin(config, encoders)
    store = open_or_create(config, place, identity, origin, tokenizer, sources, lock)

    # -- the reference's scores, block by block ---------------------------------------------------
    if blocks := store.unscored_blocks():
        score: Callable[[list[int], Bar], Iterator[tuple[int, ScoredBlock]]]
        if workers:
            score = workers.start(config, store.meta, store.tokens).scored
        else:
            scorer = BlockScorer(config, store.meta, folder, encoders, device)
            say(scorer.check(store.tokens(blocks[0])))
            if imported:
                _check_import(imported, store, scorer)
            score = partial(_one_by_one, imported or scorer, store.tokens)
        done = store.pairs - sum(map(store.block_length, blocks))
        with progress("Scoring pairs with the reference", store.pairs, done) as bar:
            _write(store, score(blocks, bar), lock, bar, _WRITERS_ON_RAY if workers else 1)

    # -- every block read back, and the store marked complete --------------------------------------
    store = StoreWriter.open(place)
    if store.meta["state"] != "complete":
        store.finish(lock.check)
    rows = store.read_array("source_row")[store.non_finite].tolist()
    numbers = store.sources()[store.non_finite].tolist() if store.is_mixture else None
    listed = place.read_beside(DROPPED)
    if (now := list_non_finite(listed, rows, numbers)) != listed:
        place.write_beside(DROPPED, now)
    name = place.name
    say(f"{name} is complete: {store.scored:,} pairs. See what is in it: fpo inspect {name}")
    return Store.open(place)


def _check_import(imported: ImportedReference, store: StoreWriter, scorer: BlockScorer) -> None:
    """Compare imported values with the model's own, before the first of them is stored."""
    try:
        with progress("Scoring a few pairs", None) as bar:
            say(f"imported log-probabilities: {imported.check(store, scorer, bar)}")
    except UserError:
        if store.meta["state"] == "tokenised":
            StoreWriter.remove(store.place)
        raise


def _one_by_one(
    scorer: BlockScorer | ImportedReference,
    tokens: Callable[[int], TokenPairs],
    blocks: list[int],
    bar: Bar,
) -> Iterator[tuple[int, ScoredBlock]]:
    for block in blocks:
        yield block, scorer.score(tokens(block), bar)


def _write(
    store: StoreWriter,
    blocks: Iterator[tuple[int, ScoredBlock]],
    lock: OwnerLock,
    bar: Bar,
    threads: int,
) -> None:
    """Write blocks as they are scored; meanwhile the next ones are scored."""

    def write(block: int, scored: ScoredBlock) -> None:
        lock.check()
        store.write_block(block, scored.reference, scored.totals, scored.top)

    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as writers:
        began, sum_, count = time.perf_counter(), 0.0, 0
        for block, scored in blocks:
            margin = scored.reference.margin
            for place in scored.non_finite:
                warn(f"{NON_FINITE} {place} is non-finite; the pair is dropped")
            missing = np.isnan(margin)
            now = time.perf_counter()
            sum_, count = sum_ + float(margin[~missing].sum()), count + int((~missing).sum())
            # The mean over the pairs that this command has scored.
            shown = {"tokens_per_second": scored.tokens / (now - began)}
            bar.show(shown | ({"margin": sum_ / count} if count else {}))
            began = now
            # An error of a writer ends the scoring.
            while len(writing) >= threads:
                writing.popleft().result()
            writing.append(writers.submit(write, block, scored))
        for one in writing:
            one.result()
