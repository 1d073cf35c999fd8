"""Real processes of `fpo` that start fast: forked from a server that has imported everything.

A start of `fpo train` takes nine seconds of imports, a fork a tenth of a second.
"""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import huggingface_hub
import terminal

import fpocli
from fpocli import __main__ as program
from fpocli.config.words import words_of

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["processes", "preloaded"])
# The server that processes fork from imports these by name, and ignores what it does not find.
_HERE = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))


def wait_for(
    moment: Callable[[], object],
    running: Callable[[], object],
    printed: Callable[[], str] = str,
) -> None:
    """Wait up to two minutes for a moment while something runs; else show what it printed."""
    deadline = time.monotonic() + 120
    while not moment():
        assert running() and time.monotonic() < deadline, printed()
        time.sleep(0.002)


class Command:
    """A running `fpo`, with what it prints.

    Args:
        words: of the command line.
        prepare: called in the process before `fpo` starts.
        main: what runs there instead of `fpo`.
        columns: stderr is a terminal of so many columns; None for a file.
        environment: added to the process's own.
    """

    def __init__(
        self,
        *words: str,
        prepare: Callable[[], object] | None = None,
        main: Callable[[], object] = program.main,
        columns: int | None = None,
        **environment: str,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp())
        files = [str(self._folder / name) for name in ("stdout", "stderr")]
        self._terminal = None
        if columns:
            self._terminal = terminal.Terminal(Path(files[1]), columns)
            files[1] = self._terminal.name
        arguments = (words, prepare, main, os.environ | environment, Path.cwd(), files)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def until(self, moment: Callable[[], object]) -> None:
        """Wait until a moment comes while it runs."""
        wait_for(moment, self.running, self.printed)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, negative for a signal; None if it still runs after so many seconds."""
        self._process.join(seconds)
        if self._terminal and self._process.exitcode is not None:
            self._terminal.close()
            self._terminal = None
        return self._process.exitcode

    def printed(self) -> str:
        """Its stdout and stderr."""
        return "".join(file.read_text(errors="replace") for file in self._folder.iterdir())

    def data(self) -> str:
        """Its stdout."""
        return (self._folder / "stdout").read_text()

    def messages(self) -> str:
        """Its stderr."""
        # In which the newlines of a terminal are kept.
        return (self._folder / "stderr").read_bytes().decode(errors="replace")

    def close(self) -> None:
        """End it and remove what it left."""
        self._process.kill()
        self._process.join()
        self._process.close()
        shutil.rmtree(self._folder)


def together(
    words: list[str],
    processes: int,
    prepare: Sequence[Callable[[], object]] = (),
    main: Callable[[], object] = program.main,
) -> list[Command]:
    """The processes of one run, as torchrun starts them but without its agent.

    Args:
        words: of the command line.
        processes: how many.
        prepare: of each process; see Command.
        main: see Command.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [
        Command(*words, prepare=own, main=main, **common, **rank)
        for rank, own in zip(ranks, prepare or [None] * processes, strict=True)
    ]


def _run(
    words: tuple[str, ...],
    prepare: Callable[[], object] | None,
    main: Callable[[], object],
    environment: dict[str, str],
    folder: Path,
    files: list[str],
) -> None:
    for number, name in enumerate(files, 1):
        with Path(name).open("wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    # The server's own object believes that it writes to a file.
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["fpo", *words]
    if prepare:
        prepare()
    main()


def results(*commands: Command) -> list[subprocess.CompletedProcess]:
    """Wait until all have ended; their exit codes and what they printed."""
    done = []
    for command in commands:
        code = command.wait(300)
        done.append(subprocess.CompletedProcess([], code, command.data(), command.messages()))
        command.close()
    return done


def use_hub(folder: Path) -> None:
    """Let this process find the hub's files there. huggingface_hub reads HF_HUB_CACHE when it is
    imported."""
    huggingface_hub.constants.HF_HUB_CACHE = str(folder)


def die_at(number: int, before: bool) -> None:
    """Let this process kill itself at the n-th time, from 0, that a file appears, moves or is
    deleted: before that, or else right after it."""
    count = itertools.count()

    def change(real, *arguments, **settings):
        now = next(count) == number
        if now and before:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*arguments, **settings)
        finally:
            if now:
                os.kill(os.getpid(), signal.SIGKILL)

    for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir"):
        setattr(os, name, partial(change, getattr(os, name)))


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def flags(config: fpocli.CacheConfig | fpocli.TrainConfig) -> list[str]:
    """The command line of a config, without the defaults."""
    words = []
    for name, value in vars(config).items():
        field = type(config).__dataclass_fields__[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value == default or value is None:
            continue
        words += words_of(name, value)
    return words
