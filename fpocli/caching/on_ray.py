"""Scores blocks in several processes, on one host or many: actors of Ray, one on each GPU.

This process, the driver, alone writes the store; hand_out.py says which worker scores which block.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
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

# Seconds that the head of a cluster has to answer.
_PATIENCE = 10.0


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
    """Context in which this process is connected to Ray.

    Args:
        config: the settings.

    Raises:
        UserError: Ray is not installed or not reached, or has too few GPUs.
    """

    def __init__(self, config: CacheConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "several workers need the package ray", 'pip install "fpocli[ray]"'
            ) from error
        if config.device not in (None, "cpu", "cuda"):
            raise UserError(
                f"--device {config.device} is of one process, and Ray gives each worker its own",
                "leave it out, or use --device cpu",
            )
        self._ray: Any = ray
        self._config = config

    def __enter__(self) -> "RayWorkers":
        with ExitStack() as stack:
            # Ray prints what its daemons report there, which is for data.
            stack.enter_context(redirect_stdout(sys.stderr))
            self._connect()
            stack.callback(self._ray.shutdown)
            self._options = self._resources()
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self._config.ray}
        if not self._config.ray:
            # This command's own, for as long as it runs, which reports nothing to Ray's authors.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cpus = max(os.cpu_count() or 1, self._config.workers or 1)
            options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        else:
            self._require_head(self._config.ray)
        handler = signal.getsignal(signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()
        try:
            self._ray.init(**options, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreachable(error) from error
        finally:
            # Ray has replaced it.
            if in_main:
                signal.signal(signal.SIGTERM, handler)

    def _require_head(self, address: str) -> None:
        """Look whether anything answers there, for which Ray would wait minutes."""
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host:
            return
        try:
            socket.create_connection((host, int(port)), _PATIENCE).close()
        except (OSError, ValueError) as error:
            raise _unreachable(error) from error

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
        # No more than one host has.
        most = max(int(host["Resources"].get("CPU", 0)) for host in self._ray.nodes())
        return {"num_gpus": 0, "num_cpus": max(1, min(most, int(here.get("CPU", 1)) // workers))}

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


def _unreachable(error: Exception) -> UserError:
    return UserError(
        f"Ray cannot be reached: {error}",
        "check --ray: the HOST:PORT of its head, or auto for the cluster of this host",
    )


def _absolute(source: str) -> str:
    """A local path in full; a hub id as it is."""
    path = Path(source)
    return str(path.absolute()) if path.exists() else source
