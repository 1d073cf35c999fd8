"""Which processes may write a folder: those of one run, on any number of hosts.

Every process that writes `ref.zarr` has a file in `ref.zarr.writers/`. The file names the process,
which locks it (`flock`), so the operating system releases it when the process exits. Locks may not
work across hosts, so the file is also touched regularly: on another host a process counts as exited
when its file has not been touched for a while. A process claims a name, such as a block, by a hard
link to its file: the first link wins on every file system, and the claim ends with the process.
"""

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.owner import Owner
from fpocli.system.signals import run_if_stopped

# Seconds without a touch after which a process on another host counts as exited.
_STALE = 120
_WRITER = "writer-"


class WriterLock:
    """Context in which this process may write a path.

    Args:
        path: the folder to write.
        run: a name shared by the processes of one launch; None for a process on its own.
        join: also write if another run does.
        first: a name to claim before any other process is admitted.

    Raises:
        UserError: another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        run: str | None = None,
        *,
        join: bool = False,
        first: str | None = None,
    ) -> None:
        self.path, self._join, self._first = path, join, first
        self._folder = path.with_name(path.name + ".writers")
        name = secrets.token_hex(4)
        # The file is hidden from other processes until this one is admitted.
        self._own, self._name = self._folder / f".{name}", _WRITER + name
        self._me = Owner.here(run or name)
        self._done = threading.Event()
        self._names: set[str] = set()

    def __enter__(self) -> "WriterLock":
        self._file = self._begin()
        threading.Thread(target=self._touch, daemon=True).start()
        try:
            with self.exclusive("joining"):
                if not self._join:
                    self._refuse_other_runs()
                self._clear_dead()
                self.claim(self._name)
                if self._first:
                    self.claim(self._first)
        except BaseException:
            self._end()
            raise
        self._signals = run_if_stopped(lambda: self._leave(True))
        self._signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.__exit__(kind, error, trace)
        self._leave(kind is not None)

    def _leave(self, stopped: bool) -> None:
        # What stopped this process must not stop the others one after the other, so its claims stay
        # until the next start.
        if stopped and self._others():
            self._names &= {self._name}
        self._end()

    def claim(self, name: str) -> bool:
        """Claim a name, such as "block-7"; False if any process, running or exited, has claimed it.

        Raises:
            UserError: the file system has no hard links, or another process has removed this one.
        """
        try:
            os.link(self._own, self._folder / name)
        except FileExistsError:
            # NFS may send a request twice and report the result of the second.
            if name in self._names or not self._is_own(name):
                return False
        except FileNotFoundError as error:
            raise self._lost() from error
        except OSError as error:
            raise UserError(
                f"the file system of {self.path} has no hard links: {error.strerror}",
                "choose --out on another one; fpo keeps two processes apart by hard links",
            ) from error
        self._names.add(name)
        return True

    def release(self, name: str) -> None:
        """Release a name."""
        self._names.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    def check_claim(self, name: str) -> None:
        """Check that this process still holds a name.

        Raises:
            UserError: another process considered this one exited, so it must not write.
        """
        if not self._is_own(name):
            raise self._lost()

    def _is_own(self, name: str) -> bool:
        try:
            there = (self._folder / name).stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._file.fileno()))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a name, after waiting for the process that has it."""
        waited = 0
        while name not in self._names and not self.claim(name):
            if self._clear(self._folder / name):
                continue
            if waited == 50 and (owner := self.owner(name)):
                say(f"waiting for {owner} ({name})", any_rank=True)
            time.sleep(0.1)
            waited += 1
        try:
            yield
        finally:
            self.release(name)

    def owner(self, name: str) -> Owner | None:
        """The process that claimed a name, running or exited; None if the name is free."""
        return _owner(self._folder / name)

    def holder_is_running(self, name: str) -> bool:
        """Whether a name is held by a running process."""
        return self._lives(self._folder / name)

    def _begin(self) -> TextIO:
        """Create this process's own file."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                file = self._own.open("x+", encoding="utf-8")
            except FileNotFoundError:
                continue  # the last process has just removed the folder
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                self._own.unlink(missing_ok=True)
                raise UserError(
                    f"the file system of {self.path} has no locks: {error.strerror}",
                    "choose --out on another one; on Lustre mount it with -o flock",
                ) from error
            file.write(json.dumps(asdict(self._me)))
            file.flush()
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # removed by another process before it was locked

    def _end(self) -> None:
        self._done.set()
        for name in list(self._names):
            self.release(name)
        self._own.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # it is not empty
            self._folder.rmdir()

    def _touch(self) -> None:
        while not self._done.wait(_STALE / 6):
            # Somebody may have deleted it.
            with suppress(OSError):
                os.utime(self._own)

    def _files(self) -> list[Path]:
        return [file for file in sorted(self._folder.iterdir()) if file != self._own]

    def _others(self) -> list[Owner]:
        """The other running processes."""
        files = [file for file in self._files() if file.name.startswith(_WRITER)]
        owners = [_owner(file) for file in files if file.name != self._name and self._lives(file)]
        return [owner for owner in owners if owner]

    def _refuse_other_runs(self) -> None:
        for owner in self._others():
            if owner.run != self._me.run:
                raise UserError(
                    f"another process is writing {self.path}: {owner}",
                    "wait for it, or choose another --out; if its host is lost, wait two minutes",
                )

    def _clear_dead(self) -> None:
        """Remove the files of processes that have exited, and report them."""
        left: dict[Owner, list[str]] = {}
        for file in self._files():
            owner = _owner(file)
            if self._clear(file) and owner:
                left.setdefault(owner, []).append(file.name)
        for owner, names in left.items():
            claims = [name for name in names if not name.startswith((_WRITER, "."))]
            what = f", with {', '.join(claims)}," if claims else ""
            text = f"{owner}, stopped writing {self.path}{what}; resuming from there"
            say(text, any_rank=True)

    def _clear(self, file: Path) -> bool:
        """Remove the file of a process that has exited; False if it is running."""
        try:
            with file.open("r+", encoding="utf-8") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._silent(file) and os.path.samestat(file.stat(), os.fstat(opened.fileno())):
                    # This process holds its lock, so it removes the file that it checked.
                    file.unlink()
                    return True
        except FileNotFoundError:
            return True
        except BlockingIOError:
            pass
        return False

    def _lives(self, file: Path) -> bool:
        try:
            with file.open("r+", encoding="utf-8") as opened:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return not self._silent(file)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def _silent(self, file: Path) -> bool:
        """Whether a file without a lock is of this host, or has long not been touched."""
        owner = _owner(file)
        if owner is None or owner.host == self._me.host:
            return True
        # Both times are those of the file server, since the hosts' clocks may differ.
        return self._own.stat().st_mtime - file.stat().st_mtime > _STALE - _STALE / 6

    def _lost(self) -> UserError:
        return UserError(
            f"this process did not respond for two minutes, so another one took over its part of "
            f"{self.path}",
            "run the same command again; what is finished is kept",
        )


def _owner(file: Path) -> Owner | None:
    """The process that a file describes; None if it describes none."""
    try:
        return Owner.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
