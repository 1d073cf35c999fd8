"""Who writes a folder: one process, which holds the lock of a file beside the folder.

The operating system releases the lock when the process ends, in whatever way.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.owner import Owner, OwnerLock, describe_owner, refused

# Seconds in which a process that is ending may still release the lock.
_PATIENCE = 1.0


class WriterLock(OwnerLock):
    """Context in which this process alone may write a path.

    Args:
        path: the folder to write.

    Raises:
        UserError: another process is writing it, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.with_name(path.name + ".lock")
        # On a file system without locks, filelock would rely on the file's existence alone.
        # Any thread may release it, such as the one that ends the program at a signal.
        self._lock = FileLock(
            self._file, timeout=_PATIENCE, thread_local=False, fallback_to_soft=False
        )

    def _take(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise refused(self._path, self._text()) from error
        except OSError as error:
            if error.filename:
                raise
            raise UserError(
                f"the file system of {self._path} has no locks: {error.strerror}",
                "choose --out on another one; on Lustre mount it with -o flock",
            ) from error
        self._held = self._file.stat()
        if self._held.st_size:
            say(
                f"{describe_owner(self._text())}, stopped writing {self._path}; resuming from there"
            )
        self._file.write_text(json.dumps(asdict(Owner.here())), encoding="utf-8")

    def check(self) -> None:
        """Refuse to write on without the lock.

        Raises:
            UserError: somebody has removed or replaced the file, so another process may write.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(self._file.stat(), self._held):
                return
        raise UserError(
            f"{self._file} was removed while this process was writing {self._path}",
            "run the same command again when no other one writes there; what is finished is kept",
        )

    def _leave(self) -> None:
        # Before the release: whoever waits for this file finds it removed and makes a new one.
        with suppress(UserError):
            self.check()
            self._file.unlink()
        self._lock.release()

    def _text(self) -> str:
        with suppress(OSError, ValueError):
            return self._file.read_text(encoding="utf-8")
        return ""
