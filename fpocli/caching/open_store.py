"""What the cache stage has to do: what its store is made from, and the store as it stands.

Opens the store that a command began, mends one, or tokenises the data and lays out a new one.
"""

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from fpocli.config import HARMLESS, CacheConfig
from fpocli.data.layouts import Pair, Source, read_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.features.encoder import SparseEncoder
from fpocli.model.attention import choose_kernel
from fpocli.store.layout import fingerprint, raw_bytes
from fpocli.store.reader import Store
from fpocli.store.records import Tokens
from fpocli.store.verify import find_damage
from fpocli.store.writer import Draft
from fpocli.system.console import console, progress, say
from fpocli.system.errors import UserError, differences
from fpocli.system.model_folder import ModelFolder, default_sae


def chosen_saes(config: CacheConfig) -> list[str]:
    """The SAE of each site: the one that is given, or the model's default."""
    return config.sae or [default_sae(config.model, layer, kind) for layer, kind in config.sites]


def identify(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    tokenizer: PairTokenizer,
    source: Source,
    encoders: dict[str, SparseEncoder],
) -> dict[str, Any]:
    """What the store is to be made from."""
    return {
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


def open_or_tokenise(
    config: CacheConfig, identity: dict[str, Any], tokenizer: PairTokenizer, source: Source
) -> Draft:
    """The store this command means: the one it began earlier, or a new one."""
    path = Path(config.out)
    Draft.require_replaceable(path)
    if path.exists() and not (config.overwrite or Draft.unfinished(path)):
        if config.repair:
            return _repair(config, identity, tokenizer, source)
        store = Draft.open(path)
        _refuse_others(config, store, identity)
        store.note_arithmetic(identity["model"])
        done = store.blocks - len(store.missing_blocks())
        if done:
            say(f"{path}: {done} of {store.blocks} blocks are there already")
        return store
    pairs, tokens = _tokenise(tokenizer, read_pairs(source, tokenizer.drops), config.limit)
    about = identity | {"writer": _versions(), "pairs": pairs}
    _print_plan(path, about, tokens)
    listed = list_of_dropped(path)
    tokenizer.drops.write(listed)
    if tokenizer.drops.counts:
        console.print(f"the dropped rows are listed in {listed}")
    Draft.remove(path)
    return Draft.create(path, about, tokens)


def _refuse_others(config: CacheConfig, store: Store, identity: dict[str, Any]) -> None:
    """Refuse a store that was made from something else, but for what --allow names."""
    there = {name: store.meta[name] for name in identity}
    allowed = {HARMLESS[name]: identity["model"][HARMLESS[name]] for name in config.allow}
    there |= {"model": there["model"] | allowed}
    if other := differences(there, identity):
        raise UserError(
            f"{store.path} was made with other settings: {other}",
            "give the flags it was made with, another --out, or --overwrite",
        )


def _repair(
    config: CacheConfig, identity: dict[str, Any], tokenizer: PairTokenizer, source: Source
) -> Draft:
    """The store without its damaged blocks; documents and tokens are written anew."""
    path = Path(config.out)
    about = identity | {"writer": _versions()}
    try:
        store = Store.open(path)
    except UserError as error:
        console.print(str(error))
        # The root's document may be lost, and with it what the blocks were made from.
        if Draft.fingerprint_of_blocks(path) != fingerprint(identity):
            raise UserError(
                f"{path} does not say any more that it was made with these settings",
                "give the flags it was made with; else write it anew with --overwrite",
            ) from error
    else:
        _refuse_others(config, store, identity)
        if not store.has_totals:
            raise UserError(
                f"{path} was written by an earlier version of fpo, which kept too little to repair",
                "write it anew with --overwrite",
            )
        if not find_damage(store):
            say(f"nothing is damaged in {path}")
            return Draft.open(path)
        kept = (*identity, "writer", "created", "allowed")
        about = {name: store.meta[name] for name in kept if name in store.meta}
    pairs, tokens = _tokenise(tokenizer, read_pairs(source, tokenizer.drops), config.limit)
    store = Draft.mend(path, about | {"pairs": pairs}, tokens)
    damaged = find_damage(store)
    for block, told in damaged:
        console.print(told)
        if block is not None:
            store.forget_block(block)
    console.print(f"{len(store.missing_blocks())} of {store.blocks} blocks are to be scored")
    return store


def _versions() -> dict[str, str]:
    """What writes the store."""
    return {"fpo": version("fpocli"), "zarr": version("zarr"), "torch": torch.__version__}


def list_of_dropped(path: Path) -> Path:
    """Where the rows are listed that are not in the store."""
    return path.with_name(path.name + ".dropped.jsonl")


def _describe_sites(
    config: CacheConfig, encoders: dict[str, SparseEncoder]
) -> dict[str, dict[str, Any]]:
    described = {}
    for (layer, kind), source, (name, encoder) in zip(
        config.sites, chosen_saes(config), encoders.items(), strict=True
    ):
        k = encoder.features if config.top_k == "all" else int(config.top_k)
        described[name] = {
            "layer": layer,
            "kind": kind,
            "sae": {
                "source": source,
                "architecture": encoder.architecture,
                "hash": encoder.hash(),
                "settings": encoder.settings,
            },
            "d_sae": encoder.features,
            "k": min(k, encoder.features),
            "value_dtype": config.value_dtype,
            "pooling": "mean over the positions that predict the response",
        }
    return described


def _tokenise(
    tokenizer: PairTokenizer, pairs: Iterator[Pair], limit: int | None
) -> tuple[dict[str, Any], Tokens]:
    """What became of the source's pairs, and the token runs of those that are kept."""
    drops = tokenizer.drops
    runs: list[np.ndarray] = []
    rows: list[int] = []
    with progress("Tokenising pairs", limit) as bar:
        for pair in tokenizer(pairs):
            for run in (pair.prompt, pair.chosen, pair.rejected):
                runs.append(np.asarray(run, np.uint32))
            rows.append(pair.row)
            bar.advance()
    if not drops.read:
        raise UserError("the data hold no rows", "check --data")
    if not rows:
        raise UserError(
            f"no pair is left of {drops.read}: {drops}",
            "check the data, --max-length and --max-prompt-length; --strict names the first row",
        )
    ends = np.cumsum([len(run) for run in runs]).reshape(-1, 3)
    starts = np.concatenate([[0], ends[:-1, 2]])
    counts = {"read": drops.read, "kept": len(rows), "dropped": dict(drops.counts)}
    return counts, Tokens(
        ids=np.concatenate(runs),
        spans=np.column_stack([starts, ends]),
        source_row=np.asarray(rows, np.int64),
    )


def _print_plan(path: Path, about: dict[str, Any], tokens: Tokens) -> None:
    pairs = about["pairs"]
    dropped = "".join(f", {count:,} {reason}" for reason, count in pairs["dropped"].items())
    size = raw_bytes(about | {"tokens": len(tokens.ids)})
    parent = path.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    console.print(
        f"{pairs['kept']:,} pairs of {pairs['read']:,} read{dropped}\n"
        f"{len(tokens.ids):,} tokens; sites {', '.join(about['sites'])}\n"
        f"{path} takes at most {decimal(size)}; {decimal(free)} are free"
    )
    if size > free:
        raise UserError(
            f"{path} may take {decimal(size)} and only {decimal(free)} are free",
            "give --out on another disk, a smaller --top-k, or a --limit",
        )
