"""The process that writes a folder or a bucket, as it is recorded there and named in messages."""

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self


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
