"""Means of the metrics over the pairs of a step, from all micro-batches and ranks."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.ranks import same_on_all_ranks

# The most pairs that an error names.
_NAMED = 8


class Means:
    """Means of metrics over the pairs of a step, gathered from micro-batches and ranks."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._finite: list[tuple[np.ndarray, Tensor]] = []

    def add(self, metrics: dict[str, Tensor], weights: Tensor, pairs: np.ndarray) -> None:
        """Add P pairs.

        Args:
            metrics: float32 [P] each; the same names every time.
            weights: float32 [P], what each pair counts in the mean.
            pairs: int64 [P], their numbers in the store.
        """
        self._names = list(metrics)
        values = torch.stack(list(metrics.values()))
        sums = values.double() @ weights.double()
        self._sums = sums if self._sums is None else self._sums + sums
        # Looked at only if a mean turns out not to be finite: a look waits for the device.
        self._finite.append((pairs, values.isfinite().all(0)))

    def result(self, where: str) -> dict[str, float]:
        """The means. Every rank must ask for them, as often as the others.

        Args:
            where: what the pairs are, for the error.

        Raises:
            UserError: a mean is not finite; it names the pairs. All ranks stop.
        """
        if self._sums is None:
            return {}
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        means = dict(zip(self._names, self._sums.tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise self._not_finite(f"{where}: {name} is {mean}")
        return means

    def _not_finite(self, what: str) -> BaseException:
        pairs = [number for own, finite in self._finite for number in own[~finite.cpu().numpy()]]
        if torch.distributed.is_initialized():
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, pairs)
            pairs = [number for own in everywhere for number in own]
        named = [str(number) for number in sorted(set(pairs))]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        error = UserError(
            f"{what}, from the pairs {', '.join(named[:_NAMED])}{more} of the store",
            "look at one with fpo inspect --pair; if it is sound, begin a run with a lower --lr, "
            "in another --out or with --overwrite",
        )
        return same_on_all_ranks(error)
