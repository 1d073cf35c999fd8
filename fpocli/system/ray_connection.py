"""The connection to Ray: to a cluster, or to processes of this command's own."""

import io
import os
import re
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from fpocli.system.console import say
from fpocli.system.errors import UserError

# Seconds that the head of a cluster has to answer.
_PATIENCE = 10.0
# How a report of Ray's daemons begins, and how much of one is printed.
_REPORT, _LONGEST = re.compile(r"\((raylet|autoscaler)[^)]*\) "), 200
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def connected_ray(address: str | None, workers: int | None = None) -> Iterator[Any]:
    """Connect this process to Ray, and return its module.

    Args:
        address: of a cluster; None starts Ray on this host, for as long as the context.
        workers: on this host, each with a core at least, or fewer if it has fewer.

    Raises:
        UserError: Ray is not installed, or not reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "several workers need the package ray", 'pip install "fpocli[ray]"'
        ) from error
    options: dict[str, Any] = {"address": address}
    if address:
        _require_head(address)
    else:
        # Its own, which reports nothing to Ray's authors.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = max(os.cpu_count() or 1, workers or 1)
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    with redirect_stdout(_Reports()):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            # Ray 2.60 makes a token when it starts on a host, such as for --workers, and a head
            # started there later asks for it, of a HOST:PORT only where this variable is set.
            raise _unreachable(error, "; set RAY_AUTH_MODE=token if it asks for one") from error
        finally:
            # Ray has replaced it.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        try:
            yield ray
        finally:
            ray.shutdown()


class _Reports(io.TextIOBase):
    """Stdout, which is for data: what Ray's daemons report there becomes messages, such as that a
    host is lost. The many lines of its log that follow are left out, and repetitions."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._line_follows = False

    def write(self, text: str) -> int:
        """Print the first line of a report; other text goes to stderr."""
        plain = _COLOURS.sub("", text)
        # print() writes the end of a line by itself.
        ends, self._line_follows = self._line_follows and text == "\n", False
        if report := _REPORT.match(plain):
            self._line_follows = True
            self._tell(plain[report.end() :])
        elif not ends:
            sys.stderr.write(text)
        return len(text)

    def _tell(self, report: str) -> None:
        first = report.strip().partition("\n")[0]
        if first not in self._told:
            say(f"Ray: {textwrap.shorten(first, _LONGEST, placeholder=' ...')}")
        self._told.add(first)

    def flush(self) -> None:
        """As a stream is expected to have."""
        sys.stderr.flush()


def _require_head(address: str) -> None:
    """Look whether anything answers there, for which Ray would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, ValueError) as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception, more: str = "") -> UserError:
    return UserError(
        f"Ray cannot be reached: {error}",
        "check --ray: the HOST:PORT of its head, or auto for the cluster of this host" + more,
    )
