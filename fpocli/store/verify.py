"""Reads a store back and lists what is damaged, block by block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.errors import UserError


class Damage(NamedTuple):
    """A message, and the block it is about; None for what is computed from all blocks."""

    block: int | None
    message: str


def find_damage(store: Store) -> list[Damage]:
    """Check every chunk, every block's digest, and what is computed from all blocks.

    Args:
        store: open, so its metadata is valid.
    """
    found: list[Damage] = []

    def check(block: int | None, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except UserError as error:
            found.append(Damage(block, str(error)))
            return None

    if store.is_mixture:
        check(None, store.sources)
    complete = store.meta["state"] == "complete"
    with progress("Verifying", store.blocks) as bar:
        for block in range(store.blocks):
            tokens = check(block, store.tokens, block)
            scored = check(block, store.is_scored, block)
            if scored and tokens is not None:
                check(block, store.check_reference, block, tokens)
            if scored and store.has_totals:
                check(block, store.totals, block)
            if complete and scored is False:
                found.append(Damage(block, f"block {block} of {store.path} has no digest"))
            bar.advance()
    made = store.sum_totals() if complete and store.has_totals and not found else {}
    for site in store.sites if complete else ():
        stored = {
            "mean": check(None, store.mean, site),
            "frequency": check(None, store.frequency, site),
        }
        for (name, value), total in zip(stored.items(), made.get(site, ()), strict=False):
            if value is not None and not np.array_equal(value, total):
                message = (
                    f"the array features/{site}/{name} of {store.path} does not match its blocks"
                )
                found.append(Damage(None, message))
    return found
