"""The cache stage: tokenise, run the frozen reference and its SAEs once, write the store.

blocks.py scores; this file decides what is to be done, and in which order.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from fpocli.attention import choose_kernel
from fpocli.batches import default_tokens_per_row
from fpocli.blocks import check_model, score_block
from fpocli.catalog import ModelFolder, default_sae, find_model
from fpocli.config import HARMLESS, CacheConfig
from fpocli.console import console, progress
from fpocli.drops import Drops
from fpocli.errors import UserError, differences
from fpocli.files import held
from fpocli.model import Site, check_layers, choose_device, load_model, read_config
from fpocli.pairs import Pair, Source, open_source, read_pairs
from fpocli.rows import Tokens
from fpocli.sparse import SparseEncoder, check_encoder, load_encoder
from fpocli.store import Store, raw_bytes
from fpocli.tokens import PairTokenizer


def cache(config: CacheConfig) -> Store:
    """Write the store of a reference model, or go on with one that was stopped.

    Args:
        config: the settings.

    Returns:
        The complete store.

    Raises:
        UserError: the model, SAE, data or store cannot be used; see its hint.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "fpo cache runs in one process", "start it without torchrun; training takes several"
        )
    device = choose_device(config.device)
    folder = find_model(config.model, trust_remote_code=config.trust_remote_code)
    model_config = read_config(folder)
    sites = [Site(layer, kind) for layer, kind in config.sites]
    if len(set(sites)) < len(sites):
        raise UserError("a site is given twice", "give each --layer once, or with another --site")
    check_layers(model_config, sites)
    with held(Path(config.out)):
        return _cache(config, device, folder, model_config, sites)


def _cache(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    sites: list[Site],
) -> Store:
    """The command itself, once the store is ours to write."""
    # Cheap mistakes first: the path, the template and the data, then the SAEs and the weights.
    Store.require_replaceable(Path(config.out))
    drops = Drops(config.strict)
    tokenizer = PairTokenizer(
        folder, config.chat_template, config.max_length, config.max_prompt_length, drops
    )
    source = open_source(config.data, config.split, config.limit)
    encoders = _load_encoders(config, sites, model_config.hidden_size, device)
    store = _open_or_tokenise(config, device, folder, model_config, tokenizer, source, encoders)
    todo = store.missing_blocks()
    if todo:
        model = load_model(folder, sites, getattr(torch, config.dtype), device).eval()
        check_model(model, store.tokens(todo[0]), device)
        budget = config.tokens_per_row or default_tokens_per_row(device)
        console.print(f"rows of {budget:,} tokens on {device}; {model.kernels}")
        with (
            progress("Scoring pairs with the reference", store.pairs) as bar,
            # A block is compressed and written while the next one is scored.
            ThreadPoolExecutor(1) as writer,
        ):
            bar.advance(store.pairs - sum(store.length(block) for block in todo))
            earlier: Future[None] | None = None
            for block in todo:
                rows = score_block(model, encoders, store, store.tokens(block), budget, bar)
                # One block waits at most, and an error of the writer stops the scoring.
                if earlier:
                    earlier.result()
                earlier = writer.submit(store.write_block, block, *rows)
            if earlier:
                earlier.result()
    if store.meta["state"] != "complete":
        store.finish()
    console.print(
        f"{store.path} is complete: {store.pairs:,} pairs. Look at it: fpo inspect {store.path}"
    )
    return store


def _load_encoders(
    config: CacheConfig, sites: list[Site], width: int, device: torch.device
) -> dict[str, SparseEncoder]:
    sources = _sae_sources(config)
    encoders = {}
    with progress("Loading SAEs", len(sites)) as bar:
        for site, source in zip(sites, sources, strict=True):
            encoders[str(site)] = encoder = load_encoder(source, device)
            check_encoder(encoder, source, site, width)
            bar.advance()
    return encoders


def _sae_sources(config: CacheConfig) -> list[str]:
    return config.sae or [default_sae(config.model, layer, kind) for layer, kind in config.sites]


# -- the plan: what determines the store's content -----------------------------------------------


def _open_or_tokenise(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    tokenizer: PairTokenizer,
    source: Source,
    encoders: dict[str, SparseEncoder],
) -> Store:
    """The store this command means: the one it began earlier, or a new one."""
    path = Path(config.out)
    identity: dict[str, Any] = {
        "data": source.identity,
        "tokenizer": tokenizer.identity,
        "limits": {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "truncation_side": "right",
        },
        "model": {
            "source": folder.source,
            "revision": folder.revision,
            "architecture": (model_config.architectures or [model_config.model_type])[0],
            "hash": folder.weights_hash(),
            "dtype": config.dtype,
            "attention": choose_kernel(device),
        },
        "sites": _describe_sites(config, encoders),
        "block": config.block,
    }
    if path.exists() and not (config.overwrite or Store.unfinished(path)):
        store = Store.open(path, writable=True)
        there = {name: store.meta[name] for name in identity}
        there |= {"model": there["model"] | _allowed(config, identity["model"])}
        if other := differences(there, identity):
            raise UserError(
                f"{path} was made with other settings: {other}",
                "give the flags it was made with, another --out, or --overwrite",
            )
        done = store.blocks - len(store.missing_blocks())
        console.print(f"{path}: {done} of {store.blocks} blocks are there already")
        return store
    drops = tokenizer.drops
    tokens = _tokenise(tokenizer, read_pairs(source, drops), config.limit)
    meta = identity | {
        "writer": {"fpo": version("fpocli"), "zarr": version("zarr"), "torch": torch.__version__},
        "pairs": {
            "read": drops.read,
            "kept": len(tokens),
            "dropped": dict(drops.counts),
        },
    }
    _print_plan(path, meta, tokens)
    listed = path.with_name(path.name + ".dropped.jsonl")
    drops.write(listed)
    if drops.counts:
        console.print(f"the dropped rows are listed in {listed}")
    Store.remove(path)
    return Store.create(path, meta, tokens)


def _allowed(config: CacheConfig, model: dict[str, Any]) -> dict[str, Any]:
    """What --allow lets differ from the store."""
    return {HARMLESS[allowed]: model[HARMLESS[allowed]] for allowed in config.allow}


def _describe_sites(
    config: CacheConfig, encoders: dict[str, SparseEncoder]
) -> dict[str, dict[str, Any]]:
    described = {}
    for (layer, kind), source, (name, encoder) in zip(
        config.sites, _sae_sources(config), encoders.items(), strict=True
    ):
        k = encoder.features if config.top_k == "all" else int(config.top_k)
        described[name] = {
            "layer": layer,
            "kind": kind,
            "sae": {
                "source": source,
                "architecture": encoder.architecture,
                "hash": encoder.hash(),
            },
            "d_sae": encoder.features,
            "k": min(k, encoder.features),
            "value_dtype": config.value_dtype,
            "pooling": "mean over the positions that predict the response",
        }
    return described


def _tokenise(tokenizer: PairTokenizer, pairs: Iterator[Pair], limit: int | None) -> Tokens:
    runs: list[np.ndarray] = []
    rows: list[int] = []
    with progress("Tokenising pairs", limit) as bar:
        for pair in tokenizer(pairs):
            for run in (pair.prompt, pair.chosen, pair.rejected):
                runs.append(np.asarray(run, np.uint32))
            rows.append(pair.row)
            bar.advance()
    if not tokenizer.drops.read:
        raise UserError("the data hold no rows", "check --data")
    if not rows:
        raise UserError(
            f"no pair is left of {tokenizer.drops.read}: {tokenizer.drops}",
            "check the data, --max-length and --max-prompt-length; --strict names the first row",
        )
    ends = np.cumsum([len(run) for run in runs]).reshape(-1, 3)
    starts = np.concatenate([[0], ends[:-1, 2]])
    return Tokens(
        ids=np.concatenate(runs),
        spans=np.column_stack([starts, ends]),
        source_row=np.asarray(rows, np.int64),
    )


def _print_plan(path: Path, meta: dict[str, Any], tokens: Tokens) -> None:
    pairs = meta["pairs"]
    dropped = "".join(f", {count:,} {reason}" for reason, count in pairs["dropped"].items())
    size = raw_bytes(meta, len(tokens.ids))
    parent = path.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    console.print(
        f"{pairs['kept']:,} pairs of {pairs['read']:,} read{dropped}\n"
        f"{len(tokens.ids):,} tokens; sites {', '.join(meta['sites'])}\n"
        f"{path} takes at most {decimal(size)}; {decimal(free)} are free"
    )
    if size > free:
        raise UserError(
            f"{path} may take {decimal(size)} and only {decimal(free)} are free",
            "give --out on another disk, a smaller --top-k, or a --limit",
        )
