"""Scores blocks in several processes, on one host or many: actors of Ray, one on each GPU.

This process, the driver, alone writes the store; hand_out.py says which worker scores which block.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fpocli.caching.block_scorer import BlockScorer
from fpocli.caching.hand_out import HandOut
from fpocli.caching.score_block import ScoredBlock
from fpocli.config import CacheConfig
from fpocli.store.records import TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.errors import UserError


class Worker:
    """What an actor runs.

    Args:
        config: the settings, with the SAEs named.
        meta: attributes of the store.
        first: pairs for the start-up check.
    """

    def __init__(self, config: CacheConfig, meta: dict[str, Any], first: TokenPairs) -> None:
        self._config, self._meta, self._first = config, meta, first

    @cached_property
    def _scorer(self) -> BlockScorer:
        return BlockScorer.on_worker(self._config, self._meta)

    def start(self) -> str:
        """Load the reference and check it; what runs, in words.

        Raises:
            UserError: it cannot be used on this host.
        """
        return self._scorer.check(self._first)

    def score(self, tokens: TokenPairs, left_out: frozenset[int]) -> ScoredBlock:
        """See `score_block`."""
        return self._scorer.score(tokens, Bar("", None), left_out)

    def attempt(self, tokens: TokenPairs, left_out: frozenset[int]) -> None:
        """The same without the values, to see whether this process survives it."""
        self.score(tokens, left_out)


class RayWorkers:
    """Makes workers where Ray has room for them.

    Args:
        ray: the module, connected.
        config: the settings.

    Raises:
        UserError: Ray has too few GPUs, or none and the number of workers is not given.
    """

    def __init__(self, ray: Any, config: CacheConfig) -> None:
        self._ray, self._config = ray, config
        self._options = self._resources()

    def _resources(self) -> dict[str, int]:
        """What Ray reserves for each worker."""
        here, workers = self._ray.cluster_resources(), self._config.workers
        gpus = int(here.get("GPU", 0)) if self._config.device != "cpu" else 0
        if gpus:
            if workers and workers > gpus and not self._config.ray:
                raise UserError(
                    f"--workers {workers} asks for more GPUs than this machine has: {gpus}",
                    "ask for fewer, or add --device cpu",
                )
            return {"num_gpus": 1, "num_cpus": 1}
        if not workers:
            raise UserError(
                "Ray has no GPU", "say on how many processes the CPUs are shared out: --workers N"
            )
        cores = [int(host["Resources"].get("CPU", 0)) for host in self._ray.nodes()]
        return {"num_gpus": 0, "num_cpus": cores_of_each(workers, cores)}

    @property
    def device(self) -> torch.device:
        """The kind of device on which the workers run."""
        return torch.device("cuda" if self._options["num_gpus"] else "cpu")

    def start(
        self, config: CacheConfig, meta: dict[str, Any], tokens: Callable[[int], TokenPairs]
    ) -> HandOut:
        """Start the workers; returns when the first one has loaded the model.

        Args:
            config: the settings, with the SAEs named.
            meta: attributes of the store.
            tokens: returns the token ids of a block.

        Raises:
            UserError: it cannot be used, or workers end before they have loaded it.
        """
        # Workers may have another current folder.
        config = replace(
            config, model=_absolute(config.model), sae=[_absolute(sae) for sae in config.sae]
        )
        actor = self._ray.remote(**self._options)(Worker)
        first = self._ray.put(tokens(0))
        workers = HandOut(
            self._ray,
            lambda: actor.remote(config, meta, first),
            self._number,
            tokens,
            drop_crashing=config.drop_crashing,
        )
        workers.start()
        return workers

    def _number(self) -> int:
        """How many workers there should be: hosts may join and leave at any time."""
        return self._config.workers or max(1, int(self._ray.cluster_resources().get("GPU", 0)))


def cores_of_each(workers: int, cores: list[int]) -> int:
    """The most cores that each worker may have, so that all find room.

    Args:
        workers: how many there are to be.
        cores: of each host.
    """
    shares = range(max(1, sum(cores) // workers), 1, -1)
    return next((n for n in shares if sum(host // n for host in cores) >= workers), 1)


def _absolute(source: str) -> str:
    """A local path in full; a hub id as it is."""
    path = Path(source)
    return str(path.absolute()) if path.exists() else source
