"""The processes of one launch: which of them speaks for all, and what they exchange."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from fpocli.system.errors import UserError

# Ranks that are done wait for the slowest one, and a lost one is noticed by its heartbeats.
_PATIENCE = timedelta(days=30)
# Seconds that rank 0 may take until it has told an error; its trackers are closed before.
_TELLING = 30.0
# torchrun sets this for each process that it starts: where to write an error, which fpo does not.
_LAUNCH = "TORCHELASTIC_ERROR_FILE"


def is_first_rank() -> bool:
    """Whether this process has rank 0 of those a launcher started, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


def same_on_all_ranks(error: UserError) -> BaseException:
    """What to raise where every rank meets the same error: rank 0 reports it, the others exit.

    Those of torchrun raise it as well, for `tell_once`.
    """
    return error if is_first_rank() or _LAUNCH in os.environ else SystemExit(2)


def tell_once(message: str, tell: Callable[[], None]) -> None:
    """Tell of an error that processes which torchrun has started may all meet: rank 0 does.

    torchrun ends all processes when one has ended, so the others wait until it is told. If it is
    not, as where rank 0 did not meet the error or is on another host, one of them tells it.

    Args:
        message: the error, by which processes that met the same one know it.
        tell: prints it.
    """
    if _LAUNCH not in os.environ:
        tell()
        return
    # The file is in a folder of the process, and that in one of the launch.
    launch = Path(os.environ[_LAUNCH]).parents[1]
    told = launch / f"told-{hashlib.sha256(message.encode()).hexdigest()}"
    if is_first_rank():
        tell()
        # The launcher may be gone, and its folder with it.
        with suppress(OSError):
            told.touch()
        return
    end = time.monotonic() + _TELLING
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.01)
    try:
        told.touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:
        pass
    tell()


@dataclass(frozen=True)
class Ranks:
    """The connected processes of one launch, or a process on its own.

    Args:
        rank: of this process.
        world: number of processes.
        group: torch's process group; None is the default one.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def connected(cls) -> Self:
        """Those of torch's default process group, which exists."""
        import torch

        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def on_first(self, work: Callable[[], Any]) -> None:
        """Do something on rank 0, while the others wait; if it fails, all ranks raise."""
        failure: list[UserError | None] = [None]
        if self.rank == 0:
            try:
                work()
            except UserError as error:
                failure = [error]
        failure = [self.of_first(failure[0])]
        if failure[0] is not None:
            raise same_on_all_ranks(failure[0])

    def on_each(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; if it fails on one, all ranks raise. Returns this rank's."""
        result, failure = None, None
        try:
            result = work()
        except UserError as error:
            failure = error
        failure = self.of_first(next(filter(None, self.gather(failure)), None))
        if failure is not None:
            raise same_on_all_ranks(failure)
        return result

    def of_first(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""
        if self.world == 1:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, group=self.group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, on rank 0; an empty list on the others."""
        if self.world == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world if self.rank == 0 else []
        torch.distributed.gather_object(value, values or None, group=self.group)
        return values


@contextmanager
def connected_ranks() -> Iterator[Ranks]:
    """Connect the processes of a launch on their CPUs, for results that are gathered at the end.

    Without a launcher, or with one process, nothing is started.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    import torch

    from fpocli.system.heartbeat import heartbeat

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    with heartbeat(rank, world):
        yield Ranks(rank, world, group)
        torch.distributed.barrier(group)
