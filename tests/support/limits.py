"""Limits of the operating system, for a while."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory(most: float):
    """Take no more than so many bytes of address space above what is taken already."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
