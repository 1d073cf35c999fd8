"""Limits of the operating system, as contexts."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory(most: float):
    """Limit the address space to so many bytes more than now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
