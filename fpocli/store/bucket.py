"""A store in a bucket: s3://, gs:// or az://. The only file that imports obstore.

Credentials and endpoints come from where each cloud's own tools have them: environment variables,
profiles, the instance's role. Requests that fail are repeated by obstore for three minutes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from fpocli.store.place import cannot_reach
from fpocli.system.errors import UserError

_KINDS = ("s3", "gs", "az")
# An endpoint of one's own may be one without TLS; those of the clouds are https anyway.
_CLIENT = {"connect_timeout": "10s", "timeout": "60s", "allow_http": True}
# After a tenth of a second, then twice as long each time, 15 seconds at most.
_RETRIES = {"max_retries": 12, "retry_timeout": timedelta(minutes=3)}


class Bucket:
    """A prefix of a bucket; see Place.

    Args:
        url: such as s3://bucket/ref.zarr.

    Raises:
        UserError: the URL names no prefix, is of another kind, or obstore is not installed.
    """

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
        self._obstore = obstore
        self.unreachable: tuple[type[Exception], ...] = (obstore.exceptions.BaseError,)
        self._url, self._prefix = f"{kind}://{path}", prefix
        with self._told():
            settings: Any = {"client_options": _CLIENT, "retry_config": _RETRIES}
            self._bucket: Any = from_url(f"{kind}://{bucket}", **settings)
            self._inside: Any = from_url(self._url, **settings)

    @property
    def name(self) -> str:
        """See Place."""
        return self._url

    def exists(self, key: str = "") -> bool:
        """See Place."""
        if not key:
            return next(self.files(), None) is not None
        with self._told():
            try:
                self._obstore.head(self._inside, key)
            except FileNotFoundError:
                return False
        return True

    def is_empty(self) -> bool:
        """See Place."""
        return not self.exists()

    def read(self, key: str) -> bytes:
        """See Place."""
        with self._told():
            return bytes(self._obstore.get(self._inside, key).bytes())

    def write(self, key: str, content: bytes) -> None:
        """See Place."""
        with self._told():
            self._obstore.put(self._inside, key, content)

    def delete(self, key: str) -> None:
        """See Place."""
        with self._told(), suppress(FileNotFoundError):
            self._obstore.delete(self._inside, key)

    def files(self, prefix: str = "") -> Iterator[str]:
        """See Place."""
        with self._told():
            for part in self._obstore.list(self._inside, prefix=prefix or None):
                yield from (about["path"] for about in part)

    def clear(self) -> None:
        """See Place. The root's metadata go first, so that the rest is no store."""
        self.delete("zarr.json")
        keys = list(self.files())
        with self._told():
            if keys:
                self._obstore.delete(self._inside, keys)

    def clear_partial(self) -> None:
        """See Place. A bucket has no partial files."""

    def leads_out(self, key: str) -> bool:
        """See Place. A bucket has no links."""
        return False

    def read_beside(self, suffix: str) -> str:
        """See Place."""
        with self._told():
            try:
                found = self._obstore.get(self._bucket, self._prefix + suffix)
            except FileNotFoundError:
                return ""
            return bytes(found.bytes()).decode()

    def write_beside(self, suffix: str, text: str) -> None:
        """See Place."""
        with self._told(), suppress(FileNotFoundError):
            if text:
                self._obstore.put(self._bucket, self._prefix + suffix, text.encode())
            else:
                self._obstore.delete(self._bucket, self._prefix + suffix)

    def beside(self, suffix: str) -> str:
        """See Place."""
        return self._url + suffix

    def free_bytes(self) -> int | None:
        """See Place."""
        return None

    def for_zarr(self) -> Any:
        """See Place."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._inside)

    # -- documents of which one process is the owner ----------------------------------------------

    def create_beside(self, suffix: str, text: str) -> str | None:
        """Write the file beside the store if there is none; its tag, None if there is one."""
        return self._put(suffix, text, "create")

    def replace_beside(self, suffix: str, text: str, tag: str) -> str | None:
        """Replace that file if it still has this tag; its new one, None if it has not."""
        return self._put(suffix, text, {"e_tag": tag})

    def read_tagged_beside(self, suffix: str) -> tuple[str, str] | None:
        """Text and tag of that file; None if there is none."""
        with self._told():
            try:
                found = self._obstore.get(self._bucket, self._prefix + suffix)
            except FileNotFoundError:
                return None
            return bytes(found.bytes()).decode(), str(found.meta["e_tag"])

    def _put(self, suffix: str, text: str, mode: Any) -> str | None:
        errors = self._obstore.exceptions
        with self._told():
            try:
                put = self._obstore.put(
                    self._bucket, self._prefix + suffix, text.encode(), mode=mode
                )
            except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
                return None
            return put["e_tag"]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Report what obstore raises in a sentence.

        Raises:
            UserError: the bucket cannot be reached, or refuses.
        """
        try:
            yield
        except self.unreachable as error:
            raise cannot_reach(self.name, error) from error
