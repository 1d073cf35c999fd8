"""Who writes a store in a bucket: one process, which has a document beside the store.

The document is created only if there is none, and refreshed and taken over only if nobody has
changed it meanwhile (conditional requests, which S3, Google Cloud and Azure decide). So two
processes are never both its owner. A process that is lost stops refreshing it.
"""

import json
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType

from fpocli.store.bucket import Bucket
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.owner import Owner
from fpocli.system.signals import run_if_stopped

_SUFFIX = ".owner.json"
# Seconds between two refreshes, and without a change after which the owner counts as lost.
_REFRESH, _LOST = 10.0, 60.0


class BucketLock:
    """Context in which this process alone may write a store.

    Args:
        bucket: where the store is.

    Raises:
        UserError: another process is writing it.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._me = Owner.here()
        self._tag: str | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "BucketLock":
        self._tag = self._bucket.create_beside(_SUFFIX, self._text()) or self._take_over()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()
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

    def _leave(self) -> None:
        self._ended.set()
        self._thread.join()
        # The document may be another's by now. If it cannot be reached, it counts as lost later.
        with suppress(UserError):
            if self._tag and self._bucket.replace_beside(_SUFFIX, self._text(), self._tag):
                self._bucket.write_beside(_SUFFIX, "")

    def check(self) -> None:
        """Refuse to write on if another process has taken over.

        Raises:
            UserError: it has, since this one did not respond for a minute.
        """
        if self._tag is None:
            raise UserError(
                f"this process did not respond for a minute, so another one writes "
                f"{self._bucket.name} now",
                "run the same command again when that one has ended; what is finished is kept",
            )

    def _take_over(self) -> str:
        """Wait for a minute whether the owner still refreshes its document."""
        known = self._bucket.read_tagged_beside(_SUFFIX)
        text = known[0] if known else ""
        say(f"{self._bucket.name} belongs to {_describe(text)}; waiting whether it still responds")
        began = time.monotonic()
        while time.monotonic() - began < _LOST:
            time.sleep(_REFRESH / 10)
            now = self._bucket.read_tagged_beside(_SUFFIX)
            if now is None:
                if tag := self._bucket.create_beside(_SUFFIX, self._text()):
                    return tag
            elif now != known:
                raise self._refused(now[0])
        if known and (tag := self._bucket.replace_beside(_SUFFIX, self._text(), known[1])):
            return tag
        raise self._refused(text)

    def _refresh(self) -> None:
        last = time.monotonic()
        while self._tag and not self._ended.wait(_REFRESH):
            try:
                self._tag = self._bucket.replace_beside(_SUFFIX, self._text(), self._tag)
                last = time.monotonic()
            except UserError:
                # Not reached this time. Others wait for _LOST seconds before they take over.
                if time.monotonic() - last > _LOST - 2 * _REFRESH:
                    self._tag = None

    def _text(self) -> str:
        # A random part, so that every refresh changes the tag.
        return json.dumps(asdict(self._me) | {"refreshed": secrets.token_hex(8)})

    def _refused(self, text: str) -> UserError:
        return UserError(
            f"another process is writing {self._bucket.name}: {_describe(text)}",
            "wait for it, or choose another --out",
        )


def _describe(text: str) -> str:
    return str(Owner.parse(text) or "an unknown process")
