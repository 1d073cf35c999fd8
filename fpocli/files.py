"""Small files, written whole or not at all; and a folder held for one process."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fpocli.console import console
from fpocli.errors import UserError
from fpocli.stopping import on_end

# Seconds after which a writer on another host, whose lock file nobody touches, is gone.
_STALE = 120


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never meets a part of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a folder for one writer, by a lock file beside it that says who.

    The system frees the lock of a process that dies. It may not reach over hosts, so a writer also
    touches the file all the time: one from another host is stale when that has stopped.

    Raises:
        UserError: another process writes it, or one on another host may.
    """
    file = path.with_name(path.name + ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as lock:
        lock.seek(0)
        host, who = _owner(lock.read())
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing {path}" + (f": {who}" if who else ""),
                "wait for it, or give another --out",
            ) from error
        own = socket.gethostname()
        if host not in ("", own) and time.time() - file.stat().st_mtime < _STALE:
            raise UserError(
                f"another host may be writing {path}: {who}",
                f"if that process is gone, wait two minutes or delete {file}",
            )
        if who:
            console.print(f"{who}, left {path} without an end; going on from there")
        lock.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(json.dumps({"host": own, "process": os.getpid(), "since": now}))
        lock.flush()
        done = threading.Event()
        threading.Thread(target=_touch, args=(file, done), daemon=True).start()
        try:
            with on_end(file.unlink):
                yield
        finally:
            done.set()
            file.unlink(missing_ok=True)


def _touch(file: Path, done: threading.Event) -> None:
    while not done.wait(_STALE / 6):
        # It may have been deleted by hand.
        with suppress(OSError):
            os.utime(file)


def _owner(text: str) -> tuple[str, str]:
    """The host of a lock's writer, and all about it for people; both empty if it does not say."""
    try:
        about = json.loads(text)
        host = str(about["host"])
        return host, f"process {about['process']} on {host}, since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "", ""
