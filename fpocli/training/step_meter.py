"""Time, speed and memory of every step."""

import time

import torch

from fpocli.training.memory import MemoryMeter
from fpocli.training.prefetched import Prefetched


class StepMeter:
    """Measures steps of training; what happens between two of them does not count.

    Args:
        device: where the policy is.
        prefetched: the steps, as the loader prepares them.
    """

    def __init__(self, device: torch.device, prefetched: Prefetched) -> None:
        self._memory, self._prefetched = MemoryMeter(device), prefetched
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._memory.restart()
        self._began, self._waited = time.perf_counter(), self._prefetched.waited

    def step(self, tokens: float) -> dict[str, float]:
        """End a step: its metrics by the names of docs/method.md. All ranks must call this.

        Args:
            tokens: of the step's pairs, over all ranks.
        """
        seconds = time.perf_counter() - self._began
        return self._memory.step() | {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait": (self._prefetched.waited - self._waited) / seconds,
        }
