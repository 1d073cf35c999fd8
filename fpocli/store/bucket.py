"""A store in a bucket: s3://, gs:// or az://. The only file that imports obstore.

Credentials and endpoints come from where each cloud's own tools have them: environment variables,
profiles, the instance's role. obstore repeats requests that the server refuses to answer for now;
here those are repeated too whose answer was cut off or did not come in time.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

from fpocli.store.place import T, cannot_reach
from fpocli.system.errors import UserError

_KINDS = ("s3", "gs", "az")
# An endpoint of one's own may be one without TLS; those of the clouds are https anyway.
_CLIENT = {"connect_timeout": "10s", "timeout": "60s", "allow_http": True}
# After a tenth of a second, then twice as long each time, 15 seconds at most.
_RETRIES = {"max_retries": 12, "retry_timeout": timedelta(minutes=3)}
# Of a request whose answer was cut off or did not come; seconds before the next attempt.
_ATTEMPTS, _PAUSE = 4, 0.5
# Reads of one call that wait for their answers at once.
_AT_ONCE = 32
# What changes when a file is written: S3 and Azure compare its e_tag, Google Cloud its version.
Tag = dict[str, str]


class Bucket:
    """A prefix of a bucket; see Place.

    Args:
        url: such as s3://bucket/ref.zarr.

    Raises:
        UserError: the URL names no prefix, is of another kind, or obstore is not installed.
    """

    # An answer may be shorter than the object.
    attempts = 3

    def __init__(self, url: str) -> None:
        kind, _, path = url.rstrip("/").partition("://")
        bucket, _, prefix = path.partition("/")
        if kind not in _KINDS or not (bucket and prefix):
            raise UserError(
                f"{url} does not name a place for a store",
                f"write {', '.join(f'{known}://BUCKET/NAME' for known in _KINDS)}, or a path",
            )
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise UserError(
                f"{url} needs the package obstore", 'pip install "fpocli[cloud]"'
            ) from error
        self._obstore, errors = obstore, obstore.exceptions
        self._unreachable = errors.BaseError
        # Asking again would not change these.
        self._definite = (
            errors.AlreadyExistsError, errors.InvalidPathError, errors.NotSupportedError,
            errors.PermissionDeniedError, errors.PreconditionError, errors.UnauthenticatedError,
        )  # fmt: skip
        self._url, self._prefix = f"{kind}://{path}", prefix
        settings: Any = {"client_options": _CLIENT, "retry_config": _RETRIES}
        self._bucket: Any = self._ask(from_url, f"{kind}://{bucket}", **settings)
        self._inside: Any = self._ask(from_url, self._url, **settings)

    @property
    def name(self) -> str:
        """See Place."""
        return self._url

    def exists(self, key: str = "") -> bool:
        """See Place."""
        if not key:
            return next(self.files(), None) is not None
        try:
            self._ask(self._obstore.head, self._inside, key)
        except FileNotFoundError:
            return False
        return True

    def is_empty(self) -> bool:
        """See Place."""
        return not self.exists()

    def read(self, key: str) -> bytes:
        """See Place."""
        return self._ask(lambda: bytes(self._obstore.get(self._inside, key).bytes()))

    def version(self, key: str) -> str:
        """A text that changes when a file is written, "" if there is none."""
        try:
            about = self._ask(self._obstore.head, self._inside, key)
        except FileNotFoundError:
            return ""
        return f"{about['e_tag']} {about['last_modified'].isoformat()}"

    def write(self, key: str, content: bytes) -> None:
        """See Place."""
        self._ask(self._obstore.put, self._inside, key, content)

    def delete(self, key: str) -> None:
        """See Place."""
        with suppress(FileNotFoundError):
            self._ask(self._obstore.delete, self._inside, key)

    def files(self, prefix: str = "") -> Iterator[str]:
        """See Place."""
        parts = self._ask(lambda: list(self._obstore.list(self._inside, prefix=prefix or None)))
        yield from (about["path"] for part in parts for about in part)

    def clear(self) -> None:
        """See Place. It takes many requests; the root's metadata go last."""
        if keys := [key for key in self.files() if key != "zarr.json"]:
            self._ask(self._obstore.delete, self._inside, keys)
        self.delete("zarr.json")

    def clear_partial(self) -> None:
        """See Place. A bucket has no partial files."""

    def leads_out(self, key: str) -> bool:
        """See Place. A bucket has no links."""
        return False

    def read_beside(self, suffix: str) -> str:
        """See Place."""
        found = self.read_tagged_beside(suffix)
        return found[0] if found else ""

    def write_beside(self, suffix: str, text: str) -> None:
        """See Place."""
        key = self._prefix + suffix
        if text:
            self._ask(self._obstore.put, self._bucket, key, text.encode())
        else:
            with suppress(FileNotFoundError):
                self._ask(self._obstore.delete, self._bucket, key)

    def beside(self, suffix: str) -> str:
        """See Place."""
        return self._url + suffix

    def free_bytes(self) -> int | None:
        """See Place."""
        return None

    def for_zarr(self) -> Any:
        """See Place."""
        from zarr.storage import ObjectStore

        again = self._again

        class Patient(ObjectStore):
            async def get(self, *arguments: Any, **named: Any) -> Any:
                return await again(super().get, *arguments, **named)

            async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
                return await again(super().get_partial_values, prototype, list(key_ranges))

            async def set(self, *arguments: Any) -> None:
                await again(super().set, *arguments)

            async def getsize_prefix(self, prefix: str) -> int:
                return await again(super().getsize_prefix, prefix)

        return Patient(self._inside)

    def together(self, reads: Sequence[Callable[[], T]]) -> list[T]:
        """See Place."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(lambda read: read(), reads))

    # -- documents of which one process is the owner ----------------------------------------------

    def create_beside(self, suffix: str, text: str) -> Tag | None:
        """Write the file beside the store if there is none; its tag, None if there is one.

        Args:
            suffix: of the file.
            text: unlike any that another process writes.
        """
        return self._put(suffix, text, "create")

    def replace_beside(self, suffix: str, text: str, tag: Tag) -> Tag | None:
        """Replace that file if it still has this tag; its new one, None if it has not."""
        return self._put(suffix, text, tag)

    def read_tagged_beside(self, suffix: str) -> tuple[str, Tag] | None:
        """Text and tag of that file; None if there is none."""

        def read() -> tuple[str, Tag]:
            found = self._obstore.get(self._bucket, self._prefix + suffix)
            return bytes(found.bytes()).decode(), _tag(found.meta)

        try:
            return self._ask(read)
        except FileNotFoundError:
            return None

    def _put(self, suffix: str, text: str, mode: Any) -> Tag | None:
        errors, key = self._obstore.exceptions, self._prefix + suffix
        try:
            put = self._ask(self._obstore.put, self._bucket, key, text.encode(), mode=mode)
            return _tag(put)
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
            # Perhaps by an attempt of this process whose answer was lost.
            found = self.read_tagged_beside(suffix)
            return found[1] if found and found[0] == text else None

    def _ask(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The answer to a request.

        Raises:
            UserError: the bucket cannot be reached, or refuses.
        """
        errors = self._obstore.exceptions
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request(*arguments, **named)
            except (errors.AlreadyExistsError, errors.PreconditionError):
                raise
            except self._unreachable as error:
                self._require_another(attempt, error)
                time.sleep(_PAUSE)
        raise AssertionError

    async def _again(self, request: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The same for a request of zarr's."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await request(*arguments, **named)
            except self._unreachable as error:
                self._require_another(attempt, error)
                await asyncio.sleep(_PAUSE)
        raise AssertionError

    def _require_another(self, attempt: int, error: Exception) -> None:
        """Refuse to ask again after the last attempt, or where the answer would be the same."""
        if attempt == _ATTEMPTS or isinstance(error, self._definite):
            raise cannot_reach(self.name, error) from error


def _tag(about: Any) -> Tag:
    """That of obstore's answer; S3 gives no version where a bucket keeps none."""
    return {name: about[name] for name in ("e_tag", "version") if about[name]}
