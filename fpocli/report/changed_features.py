"""What training changed in the features of runs, side by side."""

from pathlib import Path
from typing import Any

from fpocli.config import DiffConfig
from fpocli.interpretation.diff import compare_changes, read_evaluated


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
        same = {number: run for number, run in having.items() if run.has_pairs_of(first)}
        # As the command lists them by default.
        changes = compare_changes(list(same.values()), site, DiffConfig.rate, DiffConfig.top)
        compared.append({"numbers": list(same), **changes})
    return compared
