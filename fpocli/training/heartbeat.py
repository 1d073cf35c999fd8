"""The processes of a run tell each other that they live, so that nobody waits for one that is gone.

A collective waits half an hour for a process that hangs, whose host is lost, or that died where
NCCL does not notice. The beats come from a thread, so a process may load or save as long as it
likes.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fpocli.system.signals import end

# Seconds between two beats, and how many of another process may stay away.
_BEAT, _MISSED = 5.0, 9
# Seconds in which a signal that ends this process too may arrive after another one's end.
_SIGNAL = 2.0


@contextmanager
def heartbeat(rank: int, world: int) -> Iterator[None]:
    """End this process, with a sentence, if another one of the run is gone.

    Args:
        rank: of this process.
        world: number of processes.
    """
    if world == 1:
        yield
        return
    # A connection of its own: one that waits in a collective's set-up would hold up the beats.
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
            # Where all are stopped, the others may be gone before our signal comes.
            time.sleep(_SIGNAL)
            end(1, "another process of this run is gone")
        raise
    finally:
        done.set()
        for thread in threads:
            # It may hang in the store of a process that does.
            thread.join(timeout=1)


def is_of_a_lost_process(error: Exception) -> bool:
    """Whether a collective failed, rather than what it was called for."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _key(rank: int) -> str:
    return f"fpo_heartbeat/{rank}"


def _beat(done: threading.Event, heard: list[bytes], store: Any, rank: int) -> None:
    """Tell the others, and note what they told."""
    keys = [_key(other) for other in range(len(heard))]
    number = 0
    try:
        while not done.wait(_BEAT):
            number += 1
            store.set(_key(rank), str(number))
            heard[:] = store.multi_get(keys)
    except RuntimeError:
        # The process that holds the store is gone; then nobody is heard of any more.
        pass


def _listen(done: threading.Event, heard: list[bytes], rank: int) -> None:
    """Count the beats that stay away. Not the seconds: all processes may have been suspended."""
    before, missed = list(heard), [0] * len(heard)
    while not done.wait(_BEAT):
        missed = [
            count + 1 if old == new else 0
            for count, old, new in zip(missed, before, heard, strict=True)
        ]
        before = list(heard)
        gone = [other for other, count in enumerate(missed) if count >= _MISSED and other != rank]
        if gone:
            seconds = f"{_MISSED * _BEAT:.0f} seconds"
            end(1, f"another process of this run is gone: {gone[0]} was not heard of for {seconds}")
