"""Means of the metrics over the pairs of a step, from all micro-batches and ranks.

Shapes: P pairs of a micro-batch.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.ranks import same_on_all_ranks

# Pairs that an error names at most.
_NAMED = 8


class Means:
    """Accumulates weighted sums of metrics, and reduces them over the ranks."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._finite: list[tuple[np.ndarray, Tensor]] = []

    def add(self, metrics: dict[str, Tensor], weights: Tensor, pairs: np.ndarray) -> None:
        """Add P pairs.

        Args:
            metrics: float32 [P] each; the same names every time.
            weights: float32 [P], weight of each pair in the mean.
            pairs: int64 [P], their numbers in the store.
        """
        self._names = list(metrics)
        values = torch.stack(list(metrics.values()))
        sums = values.double() @ weights.double()
        self._sums = sums if self._sums is None else self._sums + sums
        # Read only if a mean turns out to be non-finite: reading waits for the device.
        self._finite.append((pairs, values.isfinite().all(0)))

    def result(self, where: str) -> dict[str, float]:
        """The means over all ranks; a collective that every rank must call.

        Args:
            where: which pairs these are, for the error.

        Raises:
            UserError: a mean is non-finite; it names the pairs. All ranks raise.
        """
        assert self._sums is not None, "every rank has a micro-batch"
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        means = dict(zip(self._names, self._sums.tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise self._non_finite(f"{where}: {name} is {mean}")
        return means

    def _non_finite(self, what: str) -> BaseException:
        pairs = [number for own, finite in self._finite for number in own[~finite.cpu().numpy()]]
        if torch.distributed.is_initialized():
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, pairs)
            pairs = [number for own in everywhere for number in own]
        named = [str(number) for number in sorted(set(pairs))]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        error = UserError(
            f"{what}, from the pairs {', '.join(named[:_NAMED])}{more} of the store",
            "look at one with `fpo inspect --pair`; if the pair looks fine, start again with a "
            "lower --lr (new --out, or --overwrite)",
        )
        return same_on_all_ranks(error)


def values_to_show(line: dict[str, float]) -> dict[str, float]:
    """What is shown while training runs, of a line of metrics."""
    shown = {name: line[name] for name in ("loss", "u", "margin", "reward_accuracy")}
    if "distance_chosen" in line:
        shown["D"] = (line["distance_chosen"] + line["distance_rejected"]) / 2
    if "kl_chosen" in line:
        shown["K"] = (line["kl_chosen"] + line["kl_rejected"]) / 2
    if "alpha" in line:
        shown["alpha"] = line["alpha"]
    return shown
