"""The cache stage: tokenise, run the frozen reference and its SAEs once, write the store.

plan.py says what is to be done, blocks.py scores, writers.py keeps several processes apart.
"""

import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fpocli.caching.blocks import check_model, score_block
from fpocli.caching.open_store import chosen_saes, identify, list_of_dropped, open_or_tokenise
from fpocli.config import CacheConfig
from fpocli.data.dropped import Drops, list_not_finite
from fpocli.data.layouts import open_source
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.features.encoder import SparseEncoder, check_encoder, load_encoder
from fpocli.model.language_model import (
    LanguageModel,
    Site,
    check_layers,
    choose_device,
    load_model,
    read_config,
)
from fpocli.model.packing import default_tokens_per_row
from fpocli.store.reader import Store
from fpocli.store.writer import Draft
from fpocli.system.console import progress, say
from fpocli.system.errors import UserError
from fpocli.system.files import as_typed
from fpocli.system.lock import Writers
from fpocli.system.model_folder import ModelFolder, find_model


def cache(config: CacheConfig) -> Store:
    """Write the store of a reference model, or go on with one that was stopped.

    Args:
        config: the settings.

    Returns:
        The complete store.

    Raises:
        UserError: the model, SAE, data or store cannot be used; see its hint.
    """
    config = replace(config, out=str(as_typed(config.out)))
    several = config.join or int(os.environ.get("WORLD_SIZE", "1")) > 1
    anew = config.overwrite or config.repair
    if several and anew:
        raise UserError(
            "--overwrite and --repair are for one process",
            "give them without torchrun and --join; several may go on from there",
        )
    device = choose_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    folder = find_model(config.model, trust_remote_code=config.trust_remote_code)
    model_config = read_config(folder)
    sites = [Site(layer, kind) for layer, kind in config.sites]
    if len(set(sites)) < len(sites):
        raise UserError("a site is given twice", "give each --layer once, or with another --site")
    check_layers(model_config, sites)
    if not several:
        Draft.require_replaceable(Path(config.out))
    # Who takes records away does so before anybody can join.
    first = "tokens" if anew else None
    with Writers(Path(config.out), _launch(), join=config.join, first=first) as writers:
        return _cache(config, device, folder, model_config, sites, writers)


def _launch() -> str | None:
    """What processes have in common that one torchrun command started, on any number of hosts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    host = socket.gethostname() if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
    return " ".join([*(os.environ[name] for name in names), host])


def _cache(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    sites: list[Site],
    writers: Writers,
) -> Store:
    """The command itself, once this process is one of the store's writers."""
    # Cheap mistakes first: the path, the template and the data, then the SAEs and the weights.
    path = Path(config.out)
    drops = Drops(config.strict)
    tokenizer = PairTokenizer(
        folder, config.chat_template, config.max_length, config.max_prompt_length, drops
    )
    source = open_source(config.data, config.split, config.limit)
    encoders = _load_encoders(config, sites, model_config.hidden_size, device)
    identity = identify(config, device, folder, model_config, tokenizer, source, encoders)
    with writers.alone("tokens"):
        store = open_or_tokenise(config, identity, tokenizer, source)
    if store.missing_blocks():
        model = load_model(folder, sites, getattr(torch, config.dtype), device).eval()
        check_model(model, store.tokens(0), device)
        say(f"rows of {_tokens_per_row(config, device):,} tokens on {device}; {model.kernels}")
        _score_blocks(config, store, model, encoders, device, writers)
    with writers.alone("finish"):
        store = Draft.open(path)
        if store.meta["state"] != "complete":
            store.finish()
        rows = store.whole("source_row")[store.not_finite].tolist()
        list_not_finite(list_of_dropped(path), rows)
    say(f"{path} is complete: {store.scored:,} pairs. Look at it: fpo inspect {path}")
    return Store.open(path)


def _score_blocks(
    config: CacheConfig,
    store: Draft,
    model: LanguageModel,
    encoders: dict[str, SparseEncoder],
    device: torch.device,
    writers: Writers,
) -> None:
    """Score blocks until the store has all, beside other writers. A block belongs to who takes its
    name; one whose writer is lost waits for the next start, so that what is lost with it stays
    one writer.

    Raises:
        UserError: only blocks of lost writers are left.
    """

    def write(block: int, rows: Any) -> None:
        writers.require(_claim(block))
        store.write_block(block, *rows)
        writers.drop(_claim(block))

    with (
        progress("Scoring pairs with the reference", store.pairs) as bar,
        # A block is compressed and written while the next one is scored.
        ThreadPoolExecutor(1) as writer,
    ):
        earlier: Future[None] | None = None
        while todo := store.missing_blocks():
            free = [block for block in todo if writers.owner(_claim(block)) is None]
            for block in free:
                if not writers.take(_claim(block)):
                    continue
                if store.has(block):
                    writers.drop(_claim(block))
                    continue
                bar.reach(_pairs_done(store))
                rows = score_block(
                    model,
                    encoders,
                    store,
                    store.tokens(block),
                    _tokens_per_row(config, device),
                    bar,
                    drop_non_finite=config.drop_non_finite,
                )
                # One block waits at most, and an error of the writer stops the scoring.
                if earlier:
                    earlier.result()
                earlier = writer.submit(write, block, rows)
            if earlier:
                earlier.result()
                earlier = None
            if not free:
                _wait(store, todo, writers)
            bar.reach(_pairs_done(store))


def _pairs_done(store: Draft) -> int:
    return store.pairs - sum(store.length(block) for block in store.missing_blocks())


def _claim(block: int) -> str:
    return f"block-{block}"


def _wait(store: Draft, todo: list[int], writers: Writers) -> None:
    """Wait a moment for the other writers' blocks.

    Raises:
        UserError: nobody is at work on any.
    """
    lost = [
        (block, owner)
        for block in todo
        if (owner := writers.owner(_claim(block)))
        and not writers.alive(_claim(block))
        and not store.has(block)
    ]
    if len(lost) == len(todo):
        blocks, owners = zip(*lost, strict=True)
        raise UserError(
            f"all blocks of {store.path} are done but {', '.join(map(str, blocks))}, left by "
            f"{' and '.join(map(str, dict.fromkeys(owners)))}, which is gone",
            "give the same command again, it scores them anew",
        )
    time.sleep(0.5)


def _tokens_per_row(config: CacheConfig, device: torch.device) -> int:
    return config.tokens_per_row or default_tokens_per_row(device)


def _load_encoders(
    config: CacheConfig, sites: list[Site], width: int, device: torch.device
) -> dict[str, SparseEncoder]:
    sources = chosen_saes(config)
    encoders = {}
    with progress("Loading SAEs", len(sites)) as bar:
        for site, source in zip(sites, sources, strict=True):
            encoders[str(site)] = encoder = load_encoder(source, device)
            check_encoder(encoder, source, site, width)
            bar.advance()
    return encoders
