"""Who writes a folder: one process, or several that share the work, on any number of hosts.

Every writer of `ref.zarr` has one file in `ref.zarr.writers/`. It says who the process is and is
locked while it lives, so the system frees it with the process. A lock may not reach over hosts, so
the file is also touched all the time: one from another host is dead when that has stopped. What a
writer takes on, a block or a step that only one may do, is a link to its file: the first link of a
name wins on every file system, and a claim lives as long as its writer.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fpocli.system.console import console
from fpocli.system.errors import UserError
from fpocli.system.signals import on_end

# Seconds after which a writer on another host, whose file nobody touches, is dead.
_STALE = 120
_WRITER = "writer-"


@dataclass(frozen=True)
class Owner:
    """A writer, as its file tells."""

    host: str
    process: int
    since: str
    run: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class WriterLock:
    """Makes this process a writer of a path.

    Args:
        path: what is written.
        run: a name that processes have in common which were started together; None for one that
            is alone.
        join: write beside processes of another run.
        first: a name to be held before any other process is let in.

    Raises:
        UserError: another run writes it.
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
        # Nobody takes notice of the hidden file before the process is known to be let in.
        self._own, self._name = self._folder / f".{name}", _WRITER + name
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._me = Owner(socket.gethostname(), os.getpid(), now, run or name)
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
        self._signals = on_end(lambda: self._leave(True))
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
        # What stopped this writer must not stop the others, one after the other: its claims stay,
        # and the next start clears them.
        if stopped and self._others():
            self._names &= {self._name}
        self._end()

    def claim(self, name: str) -> bool:
        """Take a name, such as "block-7"; False where it is taken, by the living or the dead.

        Raises:
            UserError: the file system has no links, or another writer took this one for dead.
        """
        try:
            os.link(self._own, self._folder / name)
        except FileExistsError:
            # NFS may send a request twice and tell of the second.
            if name in self._names or not self._is_own(name):
                return False
        except FileNotFoundError as error:
            raise self._lost() from error
        except OSError as error:
            raise UserError(
                f"the file system of {self.path} has no hard links: {error.strerror}",
                "give --out on another one; links keep two writers apart",
            ) from error
        self._names.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a name back."""
        self._names.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    def require(self, name: str) -> None:
        """Make sure that a name is still this process's.

        Raises:
            UserError: another writer took this one for dead, and it may write no more.
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
        """Hold a name for a while, after waiting for whoever has it."""
        waited = 0
        while name not in self._names and not self.claim(name):
            if self._clear(self._folder / name):
                continue
            if waited == 50 and (owner := self.owner(name)):
                console.print(f"waiting for {owner} ({name})")
            time.sleep(0.1)
            waited += 1
        try:
            yield
        finally:
            self.release(name)

    def owner(self, name: str) -> Owner | None:
        """Who has a name, living or dead; None where nobody has."""
        return _owner(self._folder / name)

    def alive(self, name: str) -> bool:
        """Whether a name is held by a living process."""
        return self._lives(self._folder / name)

    def _begin(self) -> TextIO:
        """Make this process's own file."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                file = self._own.open("x+", encoding="utf-8")
            except FileNotFoundError:
                continue  # the last writer just left, with the folder
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                self._own.unlink(missing_ok=True)
                raise UserError(
                    f"the file system of {self.path} has no locks: {error.strerror}",
                    "give --out on another one; on Lustre they are mounted with -o flock",
                ) from error
            file.write(json.dumps(asdict(self._me)))
            file.flush()
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # taken for a dead one's in the moment before it was locked

    def _end(self) -> None:
        self._done.set()
        for name in list(self._names):
            self.release(name)
        self._own.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # others are in it
            self._folder.rmdir()

    def _touch(self) -> None:
        while not self._done.wait(_STALE / 6):
            # It may have been deleted by hand.
            with suppress(OSError):
                os.utime(self._own)

    def _files(self) -> list[Path]:
        return [file for file in sorted(self._folder.iterdir()) if file != self._own]

    def _others(self) -> list[Owner]:
        """The living writers beside this one."""
        files = [file for file in self._files() if file.name.startswith(_WRITER)]
        owners = [_owner(file) for file in files if file.name != self._name and self._lives(file)]
        return [owner for owner in owners if owner]

    def _refuse_other_runs(self) -> None:
        for owner in self._others():
            if owner.run != self._me.run:
                raise UserError(
                    f"another process is writing {self.path}: {owner}",
                    "wait for it, or give another --out; if its host is gone, wait two minutes",
                )

    def _clear_dead(self) -> None:
        """Remove what dead writers left, and tell of it."""
        left: dict[Owner, list[str]] = {}
        for file in self._files():
            owner = _owner(file)
            if self._clear(file) and owner:
                left.setdefault(owner, []).append(file.name)
        for owner, names in left.items():
            claims = [name for name in names if not name.startswith((_WRITER, "."))]
            what = f", with {', '.join(claims)}," if claims else ""
            console.print(f"{owner}, left {self.path}{what} without an end; going on from there")

    def _clear(self, file: Path) -> bool:
        """Remove a dead writer's file; False where it lives."""
        try:
            with file.open("r+", encoding="utf-8") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._silent(file) and os.path.samestat(file.stat(), os.fstat(opened.fileno())):
                    # Only who holds its lock removes it, so it is this file that goes.
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
        """Whether a file that nobody locks is of this host, or long untouched on another."""
        owner = _owner(file)
        if owner is None or owner.host == self._me.host:
            return True
        # Both times are the file server's; the hosts' clocks may differ.
        return self._own.stat().st_mtime - file.stat().st_mtime > _STALE - _STALE / 6

    def _lost(self) -> UserError:
        return UserError(
            f"another process took this one for dead and may write {self.path} in its place",
            "give the same command again; what is written is whole",
        )


def _owner(file: Path) -> Owner | None:
    """What a writer's file says; None where it says nothing."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        return Owner(**{name: about[name] for name in Owner.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None
