"""fpo train --where: which pairs of a store are trained on."""

import numpy as np

from fpocli.config import PAIR_COLUMNS
from fpocli.store.reader import Store
from fpocli.system.conditions import Condition
from fpocli.system.errors import UserError


def pairs_where(store: Store, condition: str | None) -> np.ndarray | None:
    """Of which pairs a condition holds: bool [N]; None without a condition.

    Raises:
        UserError: it is no condition, or holds for no pair.
    """
    if condition is None:
        return None
    spans, logp = store.read_array("spans"), store.read_array("ref/logp")
    prompt, chosen, rejected = np.diff(spans).T
    columns = (
        store.read_array("ref/margin"), logp[:, 0], logp[:, 1], prompt, chosen, rejected,
        store.read_array("source_row"), store.sources(),
    )  # fmt: skip
    named = {
        name: values.astype(np.float64) for name, values in zip(PAIR_COLUMNS, columns, strict=True)
    }
    held = Condition(condition, PAIR_COLUMNS, "--where")(named)
    if not held.any():
        raise UserError(
            f"--where {condition!r} holds for none of {store.pairs:,} pairs",
            "fpo inspect shows the lengths and margins of a store",
        )
    return held
