"""The connection to Ray: to a cluster, or to processes of this command's own. The only file that
imports it."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from fpocli.system.errors import UserError

# Seconds that the head of a cluster has to answer.
_PATIENCE = 10.0


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
    # Ray prints what its daemons report to stdout, which is for data.
    with redirect_stdout(sys.stderr):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreachable(error) from error
        finally:
            # Ray has replaced it.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        try:
            yield ray
        finally:
            ray.shutdown()


def _require_head(address: str) -> None:
    """Look whether anything answers there, for which Ray would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, ValueError) as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> UserError:
    return UserError(
        f"Ray cannot be reached: {error}",
        "check --ray: the HOST:PORT of its head, or auto for the cluster of this host",
    )
