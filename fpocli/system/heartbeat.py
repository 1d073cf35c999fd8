"""Heartbeats between the ranks of a run, so that no rank waits for one that has exited.

A collective waits half an hour for a rank that hangs, whose host is lost, or that died without NCCL
noticing. Heartbeats come from a thread, so loading and saving may take as long as they need.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fpocli.system.signals import end

# Seconds between two heartbeats, and how many of another rank may be missed.
_BEAT, _MISSED = 5.0, 9
# Seconds to wait for a signal to this process after another rank has ended.
_SIGNAL = 2.0


@contextmanager
def heartbeat(rank: int, world: int) -> Iterator[None]:
    """End this process with a message if another rank of the run is lost.

    Args:
        rank: of this process.
        world: number of processes.
    """
    if world == 1:
        yield
        return
    # A separate connection: one that waits for a collective to be set up would block heartbeats.
    default: Any = torch.distributed.distributed_c10d._get_default_store()
    store = default.clone()
    store.set(_key(rank), "0")
    torch.distributed.barrier()
    done, heard = threading.Event(), [b"0"] * world
    threads = [
        threading.Thread(target=_beat, args=(done, heard, store, rank), daemon=True),
        threading.Thread(target=_listen, args=(done, heard, rank), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    except RuntimeError as error:
        if is_of_a_lost_process(error):
            # If all ranks are being stopped, others may exit before this one gets its signal.
            time.sleep(_SIGNAL)
            end(1, "another process of this run was lost")
        raise
    finally:
        done.set()
        for thread in threads:
            # It may hang in the key-value store of a rank that hangs.
            thread.join(timeout=1)


def is_of_a_lost_process(error: Exception) -> bool:
    """Whether the error is that of a failed collective."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _key(rank: int) -> str:
    return f"fpo_heartbeat/{rank}"


def _beat(done: threading.Event, heard: list[bytes], store: Any, rank: int) -> None:
    """Send this rank's heartbeats and read those of the others."""
    keys = [_key(other) for other in range(len(heard))]
    number = 0
    try:
        while not done.wait(_BEAT):
            number += 1
            store.set(_key(rank), str(number))
            heard[:] = store.multi_get(keys)
    except RuntimeError:
        # The rank that holds the key-value store is lost; then all heartbeats are missed.
        pass


def _listen(done: threading.Event, heard: list[bytes], rank: int) -> None:
    """Count missed heartbeats, not seconds: all processes may have been suspended."""
    before, missed = list(heard), [0] * len(heard)
    while not done.wait(_BEAT):
        missed = [
            count + 1 if old == new else 0
            for count, old, new in zip(missed, before, heard, strict=True)
        ]
        before = list(heard)
        gone = [other for other, count in enumerate(missed) if count >= _MISSED and other != rank]
        if gone:
            silence = f"no heartbeat of rank {gone[0]} for {_MISSED * _BEAT:.0f} seconds"
            end(
                1,
                f"another process of this run was lost: {silence}",
            )
