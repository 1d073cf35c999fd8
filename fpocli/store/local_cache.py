"""What training and evaluation keep of a store in a bucket: the indices of its shards, in memory,
and a bounded copy of all they read, on a local disk.

The copy is in the folder FPO_CACHE_DIR; without that variable there is none. Every entry is a file
of its own: a chunk, or the index of a shard. Each ends with its crc32c, so a damaged entry is
noticed and read from the bucket again; a shard that is read whole does not, and is not kept.
Several processes may use a folder at once.
"""

import asyncio
import hashlib
import os
import secrets
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from fpocli.store.bucket import Bucket
from fpocli.store.place import Place, place_of
from fpocli.system.console import warn
from fpocli.system.errors import UserError

_FOLDER, _SIZE = "FPO_CACHE_DIR", "FPO_CACHE_GB"
_DEFAULT_GB = 50.0
# Share of a disk that is left free.
_FREE = 0.1
# After so much of the limit was written, a process deletes what was used least recently.
_SHARE = 1 / 64


def locally_cached(url: str) -> Place:
    """The place that a path or URL names, from which much is read; what is read in a bucket is kept
    on the local disk if FPO_CACHE_DIR is set.

    Raises:
        UserError: as `place_of`, or FPO_CACHE_GB is no size.
    """
    place, folder = place_of(url), os.environ.get(_FOLDER)
    if not isinstance(place, Bucket):
        return place
    if not folder:
        return _CachedBucket(place.name, None)
    text = os.environ.get(_SIZE, str(_DEFAULT_GB))
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise UserError(f"{_SIZE} is {text}", f"write a number of gigabytes, such as {_DEFAULT_GB}")
    return _CachedBucket(place.name, LocalCache(Path(folder), round(gigabytes * 1e9)))


class LocalCache:
    """Files in a folder, of which the least recently used are deleted first.

    Args:
        folder: used by nothing else.
        limit: bytes that they may take together; processes that write at once may exceed it by a
            64th each.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        # Bytes until the next look at all files; the first entry brings the first.
        self._left, self._lock = 0, threading.Lock()
        self._usable = True

    def get(self, name: str) -> bytes | None:
        """An entry; None if there is none, or it is damaged."""
        file = self._file(name)
        try:
            content = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        return content if _is_whole(content) else None

    def put(self, name: str, content: bytes) -> None:
        """Keep an entry, unless it is damaged or cannot be written."""
        if not self._usable or not _is_whole(content):
            return
        file = self._file(name)
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        try:
            if not self._has_room(len(content)):
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            self._usable = False
            warn(f"nothing more is kept in {self._folder} ({_FOLDER}): {error}")

    def _file(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / digest[2:]

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes may be written. Now and then, the oldest entries are deleted."""
        with self._lock:
            if size > self._left:
                self._left = self._make_room(size)
            self._left -= size
            return self._left >= 0

    def _make_room(self, size: int) -> int:
        """Delete what was used least recently; how many bytes may be written before the next time:
        at least `size`, or none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = []
        for file in self._folder.glob("??/*"):
            # Another process may have deleted it.
            with suppress(OSError):
                about = file.stat()
                files.append((about.st_mtime, about.st_size, file))
        used = sum(size for _, size, _ in files)
        disk = shutil.disk_usage(self._folder)
        limit = min(self._limit, used + disk.free - round(_FREE * disk.total))
        wanted = max(size, round(_SHARE * limit))
        for _, taken, file in sorted(files):
            if used + wanted <= limit:
                break
            file.unlink(missing_ok=True)
            used -= taken
        return wanted if used + wanted <= limit else 0


class _CachedBucket(Bucket):
    """A bucket whose chunks are looked up in a local cache first, if there is one; the indices of
    shards, which every row needs, are kept in memory: 16 bytes of each chunk."""

    def __init__(self, url: str, cache: LocalCache | None) -> None:
        super().__init__(url)
        self._cache = cache

    def for_zarr(self) -> Any:
        """See Place."""
        from zarr.abc.store import SuffixByteRequest
        from zarr.storage import WrapperStore

        # Of a store that was overwritten or repaired, no older entry is used.
        cache, store = self._cache, f"{self.name} {self.version('zarr.json')}"
        indices: dict[str, bytes] = {}

        class Cached(WrapperStore[Any]):
            async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
                if key.endswith("zarr.json"):
                    return await super().get(key, prototype, byte_range)
                name = f"{store} {key} {byte_range}"
                known = indices.get(name)
                if cache and known is None:
                    known = await asyncio.to_thread(cache.get, name)
                if known is not None:
                    return prototype.buffer.from_bytes(known)
                found = await super().get(key, prototype, byte_range)
                # A shard's index is at its end.
                is_index = isinstance(byte_range, SuffixByteRequest)
                if found is None or not (is_index or cache):
                    return found
                content = found.to_bytes()
                if is_index and _is_whole(content):
                    indices[name] = content
                if cache:
                    await asyncio.to_thread(cache.put, name, content)
                return found

        return Cached(super().for_zarr())


def _is_whole(content: bytes) -> bool:
    """Whether bytes end with the crc32c of the others, as zarr's codec writes it."""
    return len(content) > 4 and content[-4:] == google_crc32c.value(content[:-4]).to_bytes(
        4, "little"
    )
