"""Ending the program at a signal: at once, from any thread, with the command that resumes it.

Every file appears complete or not at all, so nothing needs to unwind. A thread reads the signal,
whatever the main thread waits for, and locks are released.
"""

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fpocli.system.output import output, write_json
from fpocli.system.ranks import is_first_rank

# The command that resumes, in the environment of processes that `--gpus` has started.
RESUME = "FPO_RESUME"
# Seconds that releasing locks and printing may take.
_PATIENCE = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_callbacks: list[Callable[[], object]] = []
# Held by the thread that ends the process; only the first one does.
_lock = threading.Lock()
_told = threading.Event()
_notes: list[Callable[[], str]] = []


def end_on_signals() -> None:
    """From now on Ctrl-C and SIGTERM end the process with 130 or 143. Only the program calls this;
    a Python session keeps its own signal handlers."""
    if _is_program():
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _read_by_the_thread)
    os.register_at_fork(after_in_child=_as_usual)
    threading.Thread(target=_wait, args=(read,), daemon=True).start()


def _is_program() -> bool:
    """Whether this process is `fpo`, and not a Python program that calls it."""
    return signal.getsignal(signal.SIGTERM) is _read_by_the_thread


def _read_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python's handlers run in the main thread, which may be in a collective."""


def _as_usual() -> None:
    """Give a forked child the default handlers, so that it does not write to our pipe."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _wait(read: int) -> None:
    while (number := os.read(read, 1)[0]) not in _SIGNALS:
        pass
    end(128 + number, "stopped" if is_first_rank() else "")


def run_if_stopped(callback: Callable[[], object]) -> AbstractContextManager[None]:
    """Call `callback` if the process is ended inside this context, which nobody leaves then."""
    return _inside(_callbacks, callback)


@contextmanager
def _inside(listed: list[Any], one: Any) -> Iterator[None]:
    listed.append(one)
    try:
        yield
    finally:
        with _lock:
            listed.remove(one)


def suppress_stop_message() -> None:
    """Print nothing more: why the program ends is reported, and a launcher may send a signal."""
    _told.set()


def add_resume_note(note: str) -> None:
    """Print this as well, after the command that resumes."""
    _notes.append(lambda: note)


def resume_note(note: Callable[[], str]) -> AbstractContextManager[None]:
    """Print what `note` says as well, if the process is ended inside this context."""
    return _inside(_notes, note)


def end(code: int, why: str) -> NoReturn:
    """End the process from any thread, and print the command that resumes it.

    Args:
        code: exit code.
        why: printed first; with "" nothing is printed.
    """
    # A pipe that nobody reads, or a disk that is gone, must not prevent the end.
    threading.Timer(_PATIENCE, os._exit, [code]).start()
    _lock.acquire()
    # A bucket that cannot be reached must not prevent the message.
    releasing = threading.Thread(target=_release, daemon=True)
    releasing.start()
    releasing.join(_PATIENCE / 2)
    if why and not _told.is_set():
        _print(why)
    os._exit(code)


def _release() -> None:
    for callback in reversed(_callbacks):
        with suppress(Exception):
            callback()


def _print(why: str) -> None:
    resume = resume_command() if _is_program() else None
    notes = [note() for note in _notes]
    if output.json_logs:
        write_json("stopped", message=why, resume=resume, notes=notes)
        return
    lines = [why, *notes]
    if resume:
        lines[0] = f"{why}; resume from what was last saved with\n    {resume}"
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def resume_command() -> str:
    """The command line as it was typed, without --overwrite, which would start over."""
    if RESUME in os.environ:
        return os.environ[RESUME]
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    script = sys.argv[0]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun"]
        if not shutil.which("torchrun"):
            launcher = [sys.executable, "-m", "torch.distributed.run"]
        nodes = os.environ["GROUP_WORLD_SIZE"]
        launcher += ["--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        # The launcher's other flags, such as those of the rendezvous, are unknown.
        launcher += ["--nnodes", nodes, "..."] if nodes != "1" else ["--standalone"]
        return shlex.join([*launcher, "-m", "fpocli", *words])
    if Path(script).name == "__main__.py":
        # Python with its flags, -m and the package.
        return shlex.join([*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1], *words])
    name = Path(script).name
    return shlex.join([name if shutil.which(name) == script else script, *words])
