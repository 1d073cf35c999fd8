"""What training changed in the features of runs, side by side."""

from pathlib import Path
from typing import Any

import numpy as np

from fpocli.config import DiffConfig
from fpocli.interpretation.diff import Evaluated, compare_changes, read_evaluated


def changed_features(paths: list[str | None]) -> list[dict[str, Any]]:
    """What `fpo features diff` gives, for each site that was measured.

    Args:
        paths: by run its folder, which fpo eval has measured; None for a run without, and for a
            model that fpo did not train.

    Returns:
        by site what `compare_changes` gives, and `numbers` of the runs it compares: those that have
        the site and were measured on the pairs of the first such run.

    Raises:
        UserError: a file is damaged.
    """
    found = {
        number: read_evaluated(path)
        for number, path in enumerate(paths)
        if path is not None and (Path(path) / "eval" / "features.npz").is_file()
    }
    compared = []
    for site in dict.fromkeys(site for run in found.values() for site in run.sites):
        having = {number: run for number, run in found.items() if site in run.sites}
        first = next(iter(having.values()))
        same = {number: run for number, run in having.items() if _same_pairs(run, first)}
        like = DiffConfig(runs=list(filter(None, paths)))
        changes = compare_changes(list(same.values()), site, like.rate, like.top)
        compared.append({"numbers": list(same), **changes})
    return compared


def _same_pairs(run: Evaluated, first: Evaluated) -> bool:
    same_store = run.result["store"]["fingerprint"] == first.result["store"]["fingerprint"]
    return same_store and np.array_equal(run.pairs, first.pairs)
