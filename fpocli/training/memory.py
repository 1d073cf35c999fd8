"""Memory that training holds: in a step, and at most (the paper's Figure 4, left)."""

import resource
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process held on the GPU, or in memory if there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MemoryMeter:
    """Measures the memory of every step, over all ranks.

    Args:
        device: where the policy is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak = device, 0
        self.restart()

    def restart(self) -> None:
        """Begin a step: what evaluations and checkpoints took before counts for the peak alone."""
        self._peak = max(self._peak, peak_memory(self._device))
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def step(self) -> dict[str, float]:
        """The most that a rank held in this step, and so far, in GB. On a CPU the first is what it
        holds now. All ranks must call this at the end of every step."""
        self._peak = max(self._peak, peak_memory(self._device))
        if self._device.type == "cuda":
            held = peak_memory(self._device)
        else:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = pages * resource.getpagesize()
        most = torch.tensor([held, self._peak], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        held_gb, peak_gb = (most / 1e9).tolist()
        return {"memory_gb": held_gb, "peak_memory_gb": peak_gb}
