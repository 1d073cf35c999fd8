"""The store that fpo cache writes: opened to resume, repaired, or created with all token ids."""

from dataclasses import replace
from typing import Any

import numpy as np
from rich.filesize import decimal

from fpocli.caching.identity import check_same_settings
from fpocli.config import CacheConfig
from fpocli.data.mixture import token_pairs
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import TokenPair
from fpocli.data.sources import Source
from fpocli.store.digest import hash_of_sources
from fpocli.store.distribution_rows import (
    LARGEST_BLOCK,
    Distributions,
    largest_block,
    lay_out,
)
from fpocli.store.place import Place
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.store.schema import array_bytes, fingerprint
from fpocli.store.verify import find_damage
from fpocli.store.writer import StoreWriter
from fpocli.system.console import progress, say, warn
from fpocli.system.errors import UserError
from fpocli.system.owner import OwnerLock

# The list of the rows that are not in the store is beside it, under its name with this.
DROPPED = ".dropped.jsonl"


def open_or_create(
    config: CacheConfig,
    place: Place,
    identity: dict[str, Any],
    origin: dict[str, Any],
    tokenizer: PairTokenizer,
    sources: list[Source],
    lock: OwnerLock,
) -> StoreWriter:
    """The store of this command: the one an earlier command began, or a new one with the token ids
    of all pairs.

    Raises:
        UserError: --out holds something else, no pair is left after tokenising, or the lock is
            lost meanwhile.
    """
    StoreWriter.require_replaceable(place)
    if place.exists() and not (config.overwrite or StoreWriter.unfinished(place)):
        if config.repair:
            return _repair(config, place, identity, origin, tokenizer, sources, lock)
        store = StoreWriter.open(place)
        check_same_settings(config, store, identity)
        lock.check()
        store.record_allowed(identity["model"])
        done = store.blocks - len(store.unscored_blocks())
        if done:
            say(f"resuming {place.name}: {done} of {store.blocks} blocks are scored")
        return store
    pairs, tokens = _tokenise(config, tokenizer, sources)
    about = identity | origin | {"pairs": pairs}
    _print_size(place, about, tokens)
    # Tokenising may take hours.
    lock.check()
    place.write_beside(DROPPED, tokenizer.dropped.listed())
    if tokenizer.dropped.counts:
        say(f"dropped rows are listed in {place.beside(DROPPED)}")
    StoreWriter.remove(place)
    return StoreWriter.create(place, about, tokens)


def _repair(
    config: CacheConfig,
    place: Place,
    identity: dict[str, Any],
    origin: dict[str, Any],
    tokenizer: PairTokenizer,
    sources: list[Source],
    lock: OwnerLock,
) -> StoreWriter:
    """The store without its damaged blocks; metadata and token ids are written again."""
    about = identity | origin
    try:
        store = Store.open(place)
    except UserError as error:
        warn(str(error))
        # The root's metadata may be lost, and with it what the blocks were made from.
        if StoreWriter.fingerprint_of_blocks(place) != fingerprint(identity):
            raise UserError(
                f"{place.name} is too damaged to check which settings it was made with, or they "
                "differ from these",
                "use the flags it was made with, or write it again with --overwrite",
            ) from error
    else:
        check_same_settings(config, store, identity)
        if not store.has_totals:
            raise UserError(
                f"{place.name} was written by an earlier version of fpo, which stored too little "
                "to repair it",
                "write it again with --overwrite",
            )
        if not find_damage(store):
            say(f"no damage found in {place.name}")
            return StoreWriter.open(place)
        kept = (*identity, *origin, "created", "allowed")
        about = {name: store.meta[name] for name in kept if name in store.meta}
    pairs, tokens = _tokenise(config, tokenizer, sources)
    lock.check()
    store = StoreWriter.rewrite_metadata(place, about | {"pairs": pairs}, tokens)
    for block, message in find_damage(store):
        warn(message)
        lock.check()
        if block is not None:
            store.mark_unscored(block)
    say(f"{len(store.unscored_blocks())} of {store.blocks} blocks will be scored again")
    return store


def _tokenise(
    config: CacheConfig, tokenizer: PairTokenizer, sources: list[Source]
) -> tuple[dict[str, Any], TokenPairs]:
    """How many rows were read, kept and dropped, and the token ids of the kept pairs."""
    dropped = tokenizer.dropped
    kept: list[TokenPair] = []
    with progress("Tokenising pairs", config.limit and config.limit * len(sources)) as bar:
        for pair in token_pairs(sources, tokenizer):
            kept.append(pair)
            bar.advance()
    if not kept:
        raise dropped.nothing_left()
    counts = {"read": dropped.read, "kept": len(kept), "dropped": dict(dropped.counts)}
    tokens = TokenPairs.of(kept)
    if len(sources) == 1:
        return counts, tokens
    source = np.array([pair.source for pair in kept], np.uint16)
    shares = np.bincount(source, minlength=len(sources)).tolist()
    for one, share in zip(sources, shares, strict=True):
        if not share:
            warn(f"no pair of {one.identity['source']} is in the store, by its weight or its rows")
    counts["sources"] = {"kept": shares, "hash": hash_of_sources(source)}
    return counts, replace(tokens, source=source)


def _print_size(place: Place, about: dict[str, Any], tokens: TokenPairs) -> None:
    """Print the pairs and bytes of the store to be written.

    Raises:
        UserError: the disk is too small for it, or memory for the distributions of a block.
    """
    pairs, block = about["pairs"], about["block"]
    dropped = "".join(f"; dropped {count:,}: {why}" for why, count in pairs["dropped"].items())
    if left := pairs["read"] - pairs["kept"] - sum(pairs["dropped"].values()):
        dropped += f"; left out {left:,} by the weights, as one source ends first"
    about = about | {"tokens": len(tokens.ids)}
    sites = "no features, as no --layer is named: for all constraints but features"
    if about["sites"]:
        sites = f"sites {', '.join(about['sites'])}"
    if distributions := Distributions.of(about):
        _require_small_blocks(tokens.counts, block, distributions)
        about["distribution_rows"], _ = lay_out(tokens.counts, block, distributions)
    sizes = array_bytes(about)
    size, smaller = sum(sizes.values()), "--top-k"
    part = ""
    if distributions:
        share = sum(size for name, size in sizes.items() if name.startswith("ref/top/"))
        part = f", {decimal(share)} of it {distributions.words}"
        smaller = "--distributions, --top-k"
    free = place.free_bytes()
    left = f"; {decimal(free)} are free" if free is not None else ""
    say(
        f"{pairs['kept']:,} pairs of {pairs['read']:,} rows{dropped}\n"
        f"{len(tokens.ids):,} tokens; {sites}\n"
        f"{place.name} will take at most {decimal(size)}{part}{left}"
    )
    if free is not None and size > free:
        raise UserError(
            f"{place.name} may take {decimal(size)}, and only {decimal(free)} are free",
            f"choose --out on another disk, a smaller {smaller}, or a --limit",
        )


def _require_small_blocks(counts: np.ndarray, block: int, about: Distributions) -> None:
    """Refuse blocks whose distributions take too much memory; two are held at a time.

    Args:
        counts: int64 [N, 2], scored positions of every pair.
        block: pairs of each.
        about: what is stored of a position.
    """
    fitting = largest_block(counts, block, about)
    if fitting < block:
        raise UserError(
            f"{about.words} of a block of {block} pairs take more than "
            f"{decimal(LARGEST_BLOCK)} of memory",
            f"use --block {fitting}" if fitting else "use a smaller --distributions",
        )
