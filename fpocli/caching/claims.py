"""Which process scores which block, where several write one store.

A process claims a block by a name in the store's WriterLock. A block whose process is lost waits
for the next start, so that what was lost with it takes no other process along.
"""

import os
import socket
import time

from fpocli.store.bucket_lock import BucketLock
from fpocli.store.writer import StoreWriter
from fpocli.system.errors import UserError
from fpocli.system.lock import WriterLock

# Seconds between two looks at what the other processes have done.
_LOOK_EVERY = 0.5


def launch_name() -> str | None:
    """What the processes of one torchrun command have in common, on any number of hosts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    host = socket.gethostname() if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
    return " ".join([*(os.environ[name] for name in names), host])


class BlockClaims:
    """The blocks of a store that this process scores.

    Args:
        lock: of the store, held by this process.
        store: the store.
    """

    def __init__(self, lock: WriterLock, store: StoreWriter) -> None:
        self._lock, self._store = lock, store

    def free(self) -> list[int]:
        """The blocks that are neither scored nor claimed, by this or any other process."""
        return [
            block
            for block in self._store.unscored_blocks()
            if self._lock.owner(_name(block)) is None
        ]

    def claim(self, block: int) -> bool:
        """Claim a block; False where another process has claimed or scored it meanwhile."""
        if not self._lock.claim(_name(block)):
            return False
        if self._store.is_scored(block):
            self.release(block)
            return False
        return True

    def check_claim(self, block: int) -> None:
        """Refuse to write a block that another process has taken over."""
        self._lock.check_claim(_name(block))

    def release(self, block: int) -> None:
        """Give a block up, because it is scored."""
        self._lock.release(_name(block))

    def wait(self) -> None:
        """Wait a moment for the blocks that other processes have claimed.

        Raises:
            UserError: the processes that claimed all those that are left are lost.
        """
        unscored = self._store.unscored_blocks()
        lost = [
            (block, owner)
            for block in unscored
            if (owner := self._lock.owner(_name(block)))
            and not self._lock.holder_is_running(_name(block))
            and not self._store.is_scored(block)
        ]
        if unscored and len(lost) == len(unscored):
            blocks, owners = zip(*lost, strict=True)
            claimed_by = " and ".join(map(str, dict.fromkeys(owners)))
            raise UserError(
                f"{self._store.path} has unscored blocks ({', '.join(map(str, blocks))}): they "
                f"were claimed by {claimed_by}, which exited before scoring them",
                "run the same command again; it scores them",
            )
        time.sleep(_LOOK_EVERY)


class OwnBlocks:
    """The blocks of a store in a bucket, which one process scores.

    Args:
        lock: of the store, held by this process.
        store: the store.
    """

    def __init__(self, lock: BucketLock, store: StoreWriter) -> None:
        self._lock, self._store = lock, store

    def free(self) -> list[int]:
        """The blocks that are not scored."""
        return self._store.unscored_blocks()

    def claim(self, block: int) -> bool:
        """See BlockClaims: nobody else claims any."""
        return True

    def check_claim(self, block: int) -> None:
        """See BlockClaims."""
        self._lock.check()

    def release(self, block: int) -> None:
        """See BlockClaims."""

    def wait(self) -> None:
        """See BlockClaims: there is nobody to wait for."""


def _name(block: int) -> str:
    return f"block-{block}"
