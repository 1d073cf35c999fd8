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

from fpocli.store.bucket import Bucket, Tag
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.owner import Owner, OwnerLock, describe_owner, refused

_SUFFIX = ".owner.json"
# Seconds between two refreshes, and without a change after which the owner counts as lost.
_REFRESH, _LOST = 10.0, 60.0
# Share of that time in which this process is sure that no other has taken over.
_SURE = 2 / 3


class BucketLock(OwnerLock):
    """Context in which this process alone may write a store.

    Args:
        bucket: where the store is.

    Raises:
        UserError: another process is writing it.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._me = Owner.here()
        self._tag: Tag | None = None
        # When the last refresh that succeeded was asked for.
        self._since = 0.0
        self._ended = threading.Event()

    def _take(self) -> None:
        self._since = time.monotonic()
        self._tag = self._bucket.create_beside(_SUFFIX, self._text()) or self._take_over()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        self._ended.set()
        # A refresh that takes long does so because the bucket cannot be reached; then the document
        # counts as lost later.
        self._thread.join(_REFRESH)
        if self._thread.is_alive():
            return
        # It may be another's by now.
        with suppress(UserError):
            if self._tag and self._bucket.replace_beside(_SUFFIX, self._text(), self._tag):
                self._bucket.write_beside(_SUFFIX, "")

    def check(self) -> None:
        """Refuse to write on if another process has taken over.

        Raises:
            UserError: it has, since this one did not respond for a minute.
        """
        # A refresh is repeated for minutes, and this process may have been suspended. Whether it is
        # still the owner only the answer says.
        while self._tag and self._thread.is_alive() and not self._is_sure():
            time.sleep(_REFRESH / 100)
        if self._tag is None:
            raise UserError(
                f"this process did not respond for a minute, so another one writes "
                f"{self._bucket.name} now",
                "run the same command again when that one has ended; what is finished is kept",
            )

    def _take_over(self) -> Tag:
        """Wait for a minute whether the owner still refreshes its document."""
        known = self._bucket.read_tagged_beside(_SUFFIX)
        text = known[0] if known else ""
        owner = describe_owner(text)
        say(f"{self._bucket.name} belongs to {owner}; waiting whether it still responds")
        began = time.monotonic()
        while time.monotonic() - began < _LOST:
            time.sleep(_REFRESH / 10)
            now = self._bucket.read_tagged_beside(_SUFFIX)
            self._since = time.monotonic()
            if now is None:
                if tag := self._bucket.create_beside(_SUFFIX, self._text()):
                    return tag
            elif now != known:
                raise refused(self._bucket.name, now[0])
        self._since = time.monotonic()
        if known and (tag := self._bucket.replace_beside(_SUFFIX, self._text(), known[1])):
            return tag
        raise refused(self._bucket.name, text)

    def _refresh(self) -> None:
        while self._tag and not self._ended.wait(_REFRESH):
            asked = time.monotonic()
            try:
                self._tag = self._bucket.replace_beside(_SUFFIX, self._text(), self._tag)
                self._since = asked
            except UserError:
                # Not reached this time. Others wait for _LOST seconds before they take over.
                if not self._is_sure():
                    self._tag = None

    def _is_sure(self) -> bool:
        return time.monotonic() - self._since < _SURE * _LOST

    def _text(self) -> str:
        # A random part, so that every refresh changes the tag.
        return json.dumps(asdict(self._me) | {"refreshed": secrets.token_hex(8)})
