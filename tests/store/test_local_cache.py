"""The local copy of what is read in a bucket: what it saves; nothing wrong ever comes from it."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from buckets import faults, s3_server
from stores import cache_config, make_loader

from fpocli import Store, UserError, cache
from fpocli.store import distribution_rows, local_cache
from fpocli.store.bucket import Bucket
from fpocli.store.local_cache import LocalCache, locally_cached
from fpocli.store.place import Folder, place_of


def entry(size: int, first: int = 0) -> bytes:
    """Content that ends with its crc32c."""
    content = bytes([first]) * (size - 4)
    return content + google_crc32c.value(content).to_bytes(4, "little")


def names(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.fixture(scope="module")
def in_folder(material, tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "ref.zarr"
    with pytest.MonkeyPatch.context() as patch:
        # Several chunks to a shard, as in stores of real texts.
        patch.setattr(distribution_rows, "_CHUNK_BYTES", 2**9)
        cache(cache_config(material, path, distributions="4", block=8))
    return path


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as url:
        yield url


@pytest.fixture
def url(bucket, in_folder, tmp_path, monkeypatch):
    """The same store in a bucket, with a local cache."""
    url = f"{bucket}/{tmp_path.name}/ref.zarr"
    upload(in_folder, url)
    monkeypatch.setenv("FPO_CACHE_DIR", str(tmp_path / "local"))
    return url


def upload(path, url):
    one, other = Folder(path), place_of(url)
    for key in one.files():
        other.write(key, one.read(key))


def epoch(place):
    """Every value that training reads in an epoch, in its order."""
    loader = make_loader(Store.open(place))
    steps = loader.steps(0, loader.steps_per_epoch, torch.device("cpu"), with_top=True)
    batches = [batch for step in steps for batch in step]
    return [
        np.concatenate([np.asarray(values(batch)).ravel() for batch in batches])
        for values in (
            lambda batch: batch.pairs,
            lambda batch: batch.batch.ids,
            lambda batch: batch.reference.logp,
            lambda batch: batch.reference.features["layer_3.resid_post"].value,
            lambda batch: batch.top.ids,
            lambda batch: batch.top.logp,
        )
    ]


@pytest.mark.slow
def test_an_epoch_is_read_once(url, in_folder):
    """And again only where a local file is damaged, cut short or gone."""
    expected, seen = epoch(in_folder), []

    def count(method, path):
        seen.append(path)

    def check(most):
        seen.clear()
        for one, other in zip(epoch(locally_cached(url)), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert len([path for path in seen if "/c/" in path]) <= most

    folder = Path(os.environ["FPO_CACHE_DIR"])
    with faults(count):
        check(10**6)
        assert len(seen) > 50
        files = names(folder)
        check(0)
        for number, file in enumerate(files):
            content = bytearray(file.read_bytes())
            content[number % len(content)] ^= 1
            file.write_bytes(content[: len(content) - number % 2])
        # Pairs that are read at once may ask for the same chunk.
        check(2 * len(files))
        assert len(seen) > len(files)
        check(0)
        shutil.rmtree(folder)
        check(10**6)


def test_the_index_of_a_shard_is_read_once(url, in_folder, monkeypatch):
    """Also without a local cache."""
    monkeypatch.delenv("FPO_CACHE_DIR")
    expected = zarr.open_group(in_folder, mode="r")["ref/top/logp"]
    seen = []
    with faults(lambda method, path: seen.append(path)):
        for place, requests in ((place_of(url), 12), (locally_cached(url), 7)):
            rows = zarr.open_group(place.for_zarr(), mode="r")["ref/top/logp"]
            seen.clear()
            for row in range(6):
                np.testing.assert_array_equal(rows[row], expected[row])
            assert len(seen) == requests


def test_another_store_of_the_same_name_is_not_read_from_it(url, in_folder):
    epoch(locally_cached(url))
    # As a store that is made again: no chunk is there any more.
    place = place_of(url)
    for key in list(place.files("ref/logp/c/")):
        place.delete(key)
    place.write("zarr.json", place.read("zarr.json") + b" ")
    root = Folder(in_folder).read("zarr.json")
    place.write("zarr.json", root[:-1] + b"\n}")
    assert Bucket(url).version("zarr.json")
    with pytest.raises(UserError):
        epoch(locally_cached(url))


def test_a_short_answer_is_not_kept(url, in_folder):
    expected, count = epoch(in_folder), iter(range(10**6))
    lock = threading.Lock()

    def decide(method, path):
        with lock:
            return "short" if "/c/" in path and next(count) % 13 == 0 else None

    for _ in range(2):
        with faults(decide):
            for one, other in zip(epoch(locally_cached(url)), expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_what_was_used_last_stays(tmp_path):
    kept = LocalCache(tmp_path, 20_000)
    for number in range(60):
        kept.put(str(number), entry(1000, number % 256))
        # Times of files are coarse.
        os.utime(kept._file(str(number)), (10**9 + number, 10**9 + number))
        assert kept.get("0") == entry(1000)
        assert sum(file.stat().st_size for file in names(tmp_path)) <= 20_000
    there = [number for number in range(300) if kept.get(str(number))]
    assert there[0] == 0 and there[1:] == list(range(there[1], 60)) and len(there) > 17
    assert kept.get("59") == entry(1000, 59)


def test_several_writers_share_a_bound(tmp_path):
    one, others = entry(1000), [LocalCache(tmp_path, 20_000) for _ in range(4)]

    def fill(number):
        for name in range(40):
            others[number].put(f"{number % 2} {name}", one)
            assert others[number].get(f"{number % 2} {name}") in (one, None)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fill, range(4)))
    assert 0 < sum(file.stat().st_size for file in names(tmp_path)) <= 20_000 + 4 * 1000


def test_a_full_disk_ends_nothing(url, in_folder, monkeypatch, capsys):
    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        found = epoch(locally_cached(url))
    for one, other in zip(found, epoch(in_folder), strict=True):
        np.testing.assert_array_equal(one, other)
    assert capsys.readouterr().err.count("nothing more is kept in") == 1
    # Nor does one that is nearly full.
    monkeypatch.setattr(local_cache, "_FREE", 1.0)
    folder = Path(os.environ["FPO_CACHE_DIR"])
    epoch(locally_cached(url))
    assert names(folder) == []


@pytest.mark.parametrize("size", ["0", "-1", "much", "inf", "nan"])
def test_a_size_that_is_none_is_refused(size, monkeypatch):
    monkeypatch.setenv("FPO_CACHE_DIR", "somewhere")
    monkeypatch.setenv("FPO_CACHE_GB", size)
    with pytest.raises(UserError, match="FPO_CACHE_GB is"):
        locally_cached("s3://bucket/ref.zarr")


def test_a_folder_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE_DIR", str(tmp_path))
    assert isinstance(locally_cached(str(tmp_path / "ref.zarr")), Folder)
