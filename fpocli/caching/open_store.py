"""What the cache stage has to do: what its store is made from, and the store as it stands.

Opens the store that a command began, mends one, or tokenises the data and lays out a new one.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from fpocli.caching.identity import check_same_settings, writer_versions
from fpocli.config import CacheConfig
from fpocli.data.layouts import read_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import Pair
from fpocli.data.sources import Source
from fpocli.store.layout import fingerprint, raw_bytes
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.store.verify import find_damage
from fpocli.store.writer import StoreWriter
from fpocli.system.console import console, progress, say
from fpocli.system.errors import UserError


def open_or_tokenise(
    config: CacheConfig, identity: dict[str, Any], tokenizer: PairTokenizer, source: Source
) -> StoreWriter:
    """The store this command means: the one it began earlier, or a new one."""
    path = Path(config.out)
    StoreWriter.require_replaceable(path)
    if path.exists() and not (config.overwrite or StoreWriter.unfinished(path)):
        if config.repair:
            return _repair(config, identity, tokenizer, source)
        store = StoreWriter.open(path)
        check_same_settings(config, store, identity)
        store.record_allowed(identity["model"])
        done = store.blocks - len(store.unscored_blocks())
        if done:
            say(f"{path}: {done} of {store.blocks} blocks are there already")
        return store
    pairs, tokens = _tokenise(tokenizer, read_pairs(source, tokenizer.drops), config.limit)
    about = identity | {"writer": writer_versions(), "pairs": pairs}
    _print_plan(path, about, tokens)
    listed = list_of_dropped(path)
    tokenizer.drops.write(listed)
    if tokenizer.drops.counts:
        console.print(f"the dropped rows are listed in {listed}")
    StoreWriter.remove(path)
    return StoreWriter.create(path, about, tokens)


def _repair(
    config: CacheConfig, identity: dict[str, Any], tokenizer: PairTokenizer, source: Source
) -> StoreWriter:
    """The store without its damaged blocks; documents and tokens are written anew."""
    path = Path(config.out)
    about = identity | {"writer": writer_versions()}
    try:
        store = Store.open(path)
    except UserError as error:
        console.print(str(error))
        # The root's document may be lost, and with it what the blocks were made from.
        if StoreWriter.fingerprint_of_blocks(path) != fingerprint(identity):
            raise UserError(
                f"{path} does not say any more that it was made with these settings",
                "give the flags it was made with; else write it anew with --overwrite",
            ) from error
    else:
        check_same_settings(config, store, identity)
        if not store.has_totals:
            raise UserError(
                f"{path} was written by an earlier version of fpo, which kept too little to repair",
                "write it anew with --overwrite",
            )
        if not find_damage(store):
            say(f"nothing is damaged in {path}")
            return StoreWriter.open(path)
        kept = (*identity, "writer", "created", "allowed")
        about = {name: store.meta[name] for name in kept if name in store.meta}
    pairs, tokens = _tokenise(tokenizer, read_pairs(source, tokenizer.drops), config.limit)
    store = StoreWriter.mend(path, about | {"pairs": pairs}, tokens)
    damaged = find_damage(store)
    for block, told in damaged:
        console.print(told)
        if block is not None:
            store.forget_block(block)
    console.print(f"{len(store.unscored_blocks())} of {store.blocks} blocks are to be scored")
    return store


def list_of_dropped(path: Path) -> Path:
    """Where the rows are listed that are not in the store."""
    return path.with_name(path.name + ".dropped.jsonl")


def _tokenise(
    tokenizer: PairTokenizer, pairs: Iterator[Pair], limit: int | None
) -> tuple[dict[str, Any], TokenPairs]:
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
    return counts, TokenPairs(
        ids=np.concatenate(runs),
        spans=np.column_stack([starts, ends]),
        source_row=np.asarray(rows, np.int64),
    )


def _print_plan(path: Path, about: dict[str, Any], tokens: TokenPairs) -> None:
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
