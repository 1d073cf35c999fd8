"""A store's pairs as a data set of datasets, in the columns that TRL's DPO trainer trains on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value

from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store

_IDS = Sequence(Value("int32"))
_COLUMNS = Features(
    {
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "ref_chosen_logps": Value("float32"),
        "ref_rejected_logps": Value("float32"),
        "pair": Value("int64"),
    }
)


def store_dataset(cache: str) -> Dataset:
    """The pairs of a store that have reference values, one row each, for `FPOTrainer`.

    datasets writes them to its own cache once. The rows may be split, shuffled and filtered.

    Args:
        cache: the store, a folder or a URL.

    Returns:
        the token ids of prompt, chosen and rejected response; S_ref of both responses in nats; and
        the pair's number in the store, by which `FeatureConstraint` finds its features.

    Raises:
        UserError: there is no complete store.
    """
    store = Store.open(locally_cached(cache))
    store.require_complete()
    # datasets names its cache by these, so a store that was written again is read again.
    written = {name: store.meta[name] for name in ("fingerprint", "created")}
    return Dataset.from_generator(
        _rows, features=_COLUMNS, gen_kwargs={"cache": str(store.path), "written": written}
    )


def _rows(cache: str, written: dict[str, str]) -> Iterator[dict[str, Any]]:
    store = Store.open(locally_cached(cache))
    for block in range(store.blocks):
        tokens, first = store.tokens(block), store.pairs_in(block).start
        reference = store.reference(block, tokens)
        for row in np.flatnonzero(~np.isnan(reference.margin)).tolist():
            pair = tokens.pair(row)
            chosen, rejected = reference.logp[row].tolist()
            yield {
                "prompt_ids": pair.prompt,
                "chosen_ids": pair.chosen,
                "rejected_ids": pair.rejected,
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
                "pair": first + row,
            }
