"""The process that writes a folder or a bucket, as it is recorded there and named in messages."""

import json
import os
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from fpocli.system.errors import UserError
from fpocli.system.signals import run_if_stopped


@dataclass(frozen=True)
class Owner:
    """A process that writes, as its file describes it."""

    host: str
    process: int
    since: str

    @classmethod
    def here(cls) -> Self:
        """This process, from now on."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), now)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The process that a JSON object describes; None if it describes none."""
        try:
            about = json.loads(text)
            return cls(**{name: about[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class OwnerLock(ABC):
    """Context in which this process alone may write a place; left also where a signal ends it."""

    def __enter__(self) -> Self:
        self._take()
        self._signals = run_if_stopped(self._leave)
        self._signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.__exit__(kind, error, trace)
        self._leave()

    @abstractmethod
    def check(self) -> None:
        """Refuse to write on without the lock.

        Raises:
            UserError: this process has lost it.
        """

    @abstractmethod
    def _take(self) -> None:
        """Become the owner.

        Raises:
            UserError: another process is.
        """

    @abstractmethod
    def _leave(self) -> None:
        """Be the owner no more."""


def describe_owner(text: str) -> str:
    """Whom a file describes, in words."""
    return str(Owner.parse(text) or "an unknown process")


def refused(name: object, text: str) -> UserError:
    """The error of a place that another process is writing, which its file describes."""
    return UserError(
        f"another process is writing {name}: {describe_owner(text)}",
        "wait for it, or choose another --out",
    )
